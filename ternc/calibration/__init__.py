"""Fits of codes and scales to the inputs a layer really sees. `ternc.quantize` drives it.

batches -> execution.py (what runs when) -> moments.py (H = E[x x^T] of one layer at a time)
        -> target.py (what the layer should compute from the inputs that it gets now)
        -> fit.py (gptq.py, refit.py, guard.py: codes, scales, bias) -> packed layer -> next layer
then, on request, tune.py (scales, norms, biases against the float model).
allocate.py chooses the planes of every layer under a budget of bits before all that.
"""
