"""What a call launches on the GPU."""

from __future__ import annotations

import torch


def kernels_of(function):
    """Names of what one call runs on the GPU."""
    function()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    device = torch.autograd.DeviceType.CUDA
    return sorted(event.name for event in profile.events() if event.device_type == device)
