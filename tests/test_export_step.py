"""`compile_step`: compiled code without Dynamo gives what the module gives, and holds no weight."""

import copy
import gc
import json

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import ternc
from ternc.errors import DifferentiationError, InputError, KernelError, UnsupportedModelError
from ternc.export import TokenStep, compile_step, load_step, step
from ternc.runtime import cpu

WIDTH, PLACES = 16, 8


class Cell(nn.Module):
    """A step with state of every kind: buffers, a number, tensors in a list and in a dict."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)  # gain 1 and shift 0: values that a compiler likes to fold
        self.layer, self.tied = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.tied.weight = self.layer.weight
        self.blend = nn.Parameter(torch.ones(1))
        self.register_buffer("seen", torch.zeros(PLACES, WIDTH))
        self.register_buffer("count", torch.tensor(0))
        self.more, self.tables = [torch.ones(1)], {"a": torch.zeros(WIDTH)}

    def forward(self, x, position):
        y = self.tied(self.layer(self.norm(x)))
        self.seen.index_copy_(0, position + self.count * 0, y)
        self.count.add_(1)
        return y * self.blend, self.seen.sum(0) * self.more[0] + self.tables["a"] + self.count


def cell(**config):
    torch.manual_seed(0)
    return ternc.quantize(Cell(), ternc.Config(**{"planes": 1, "group_size": None, **config}))


def test_class_of_torch_alone(compiled, tmp_path):
    model = nn.Sequential(cell().layer, nn.ReLU())
    x = torch.randn(2, WIDTH)
    step = compile_step(model, (x,), tmp_path / "step.pt2")
    torch.testing.assert_close(step(x), model(x))


def steps(*modules):
    """The same tokens given to all: outputs and states agree."""
    with torch.no_grad():
        for i in range(3):
            x, position = torch.randn(1, WIDTH), torch.tensor([i])
            wanted, *found = [module(x, position) for module in modules]
            for outputs in found:
                torch.testing.assert_close(outputs, wanted)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The path of a compiled step, and the state of its module after compilation."""
    if cpu.load() is None:
        pytest.skip("no C++ compiler")
    path = tmp_path_factory.mktemp("step") / "step.pt2"
    module = cell()
    step = compile_step(module, (torch.randn(1, WIDTH), torch.tensor([5])), path)
    assert (module.seen == 0).all() and module.count == 0  # it was traced, not run
    return path, step, module


def test_step_gives_what_the_module_gives(compiled):
    _, step, module = compiled
    other = copy.deepcopy(module)
    steps(other, step)
    assert module.count == other.count == 3
    assert torch.equal(module.seen, other.seen)
    assert module.tied.packed_weight is module.layer.packed_weight


def test_no_value_is_in_the_code(compiled):
    path, _, module = compiled
    module = copy.deepcopy(module)
    step = load_step(path, module)
    with torch.no_grad():
        tensors = [*module.parameters(), *module.buffers(), *module.more, *module.tables.values()]
        for tensor in tensors:
            new = torch.rand(tensor.shape) + 0.5
            tensor.copy_(new * 40 if tensor.dtype == torch.uint8 else new)
        module.layer.packed_weight.fill_(0b00011001)  # codes -1..1, not the ones compiled for
    steps(copy.deepcopy(module), step)


def test_another_instance_is_bound_and_a_replaced_tensor_is_seen_then(compiled):
    path, _, module = compiled
    first, second = copy.deepcopy(module), copy.deepcopy(module)
    second.blend = nn.Parameter(torch.full((1,), 3.0), requires_grad=False)
    step = load_step(path, first)
    steps(copy.deepcopy(first), step)
    step.bind(torch.compile(second))  # of a compiled module the one inside is taken
    steps(copy.deepcopy(second), step)
    assert second.count == first.count


def test_inputs_that_the_code_was_not_compiled_for(compiled):
    _, step, _ = compiled
    x, position = torch.randn(1, WIDTH), torch.tensor([0])
    with pytest.raises(InputError, match="takes 2 tensors, not 1"):
        step(x)
    with pytest.raises(InputError, match=r"input 0 is torch.float32 \[2, 16\]"):
        step(x.expand(2, -1), position)
    with pytest.raises(InputError, match=r"input 1 is torch.int32"):
        step(x, position.int())
    with pytest.raises(InputError, match=r"input 1 is no tensor"):
        step(x, 0)
    with pytest.raises(DifferentiationError, match="input 0 requires gradients"):
        step(x.requires_grad_(), position)
    with torch.no_grad():
        step(x, position)


def test_an_index_out_of_range_is_an_error(compiled):
    path, _, module = compiled
    step = load_step(path, copy.deepcopy(module))
    for position in (PLACES, -PLACES - 1):
        with pytest.raises(RuntimeError, match=r"out of bounds|run_func_"):  # torch 2.11: stderr
            step(torch.randn(1, WIDTH), torch.tensor([position]))


def test_modules_that_the_code_does_not_fit(compiled):
    _, step, module = compiled
    with pytest.raises(InputError, match=r"layer is .*g4.*compiled for .* row"):
        step.bind(cell(group_size=4))
    other = copy.deepcopy(module)
    other.more.clear()
    with pytest.raises(InputError, match=r"more\[0\] is no tensor"):
        step.bind(other)
    other = copy.deepcopy(module)
    other.tables["a"] = torch.zeros(2 * WIDTH)[::2]
    with pytest.raises(
        InputError, match=r"tables\['a'\] is torch.float32 \[16\] with strides \[2\]"
    ):
        step.bind(other)
    other = copy.deepcopy(module)
    other.tied.packed_weight = other.tied.packed_weight.clone()
    with pytest.raises(InputError, match="were one tensor"):
        step.bind(other)


def test_files_that_are_no_step_of_here(compiled, tmp_path, monkeypatch):
    path, _, module = compiled
    with pytest.raises(KernelError, match="is no step"):
        load_step(tmp_path / "none.pt2", module)
    (tmp_path / "text.pt2").write_text("no archive")
    with pytest.raises(KernelError, match="is no step"):
        load_step(tmp_path / "text.pt2", module)
    whole = path.read_bytes()
    for size in (len(whole) // 2, len(whole) - 100):
        (tmp_path / "half.pt2").write_bytes(whole[:size])
        with pytest.raises(KernelError, match="compile"):
            load_step(tmp_path / "half.pt2", module)
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "library_name", lambda: "_C.other.so")
        with pytest.raises(KernelError, match="compiled for other kernels"):
            load_step(path, module)
    monkeypatch.setattr(torch, "__version__", "0.1")
    with pytest.raises(KernelError, match="compiled for other torch"):
        load_step(path, module)


def test_compilation_that_fails_leaves_the_former_file(tmp_path, monkeypatch):
    def half(exported, package_path, inductor_configs):
        with open(package_path, "wb") as file:
            file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", half)
    path = tmp_path / "step.pt2"
    path.write_bytes(b"former")
    with pytest.raises(KernelError, match="cannot compile it: disk full"):
        compile_step(cell().layer, (torch.randn(1, WIDTH),), path)
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == b"former"


@pytest.fixture
def interpreted(monkeypatch):
    """Steps run as graphs, without machine code and without files."""
    written = {}

    def compile_package(gm, inputs, path, facts):
        written[path] = (lambda arguments: gm(*arguments)), json.loads(json.dumps(facts))

    monkeypatch.setattr(step, "compile_package", compile_package)
    monkeypatch.setattr(step, "load_package", written.pop)


def test_a_class_has_any_number_of_steps_and_they_hold_no_module(interpreted, tmp_path):
    model, dead = cell().layer, []
    for rows in range(1, torch._dynamo.config.recompile_limit + 3):
        module = copy.deepcopy(model)
        x = torch.randn(rows, WIDTH)
        torch.testing.assert_close(compile_step(module, (x,), tmp_path / "a.pt2")(x), module(x))
        dead.append(StorageWeakRef(module.packed_weight.untyped_storage()))
        del module
    gc.collect()
    assert all(storage.expired() for storage in dead)


@pytest.mark.parametrize("kind", ["GPT2", "Llama"])
def test_token_of_a_language_model(kind, interpreted, tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=64, intermediate_size=48, bos_token_id=0, eos_token_id=1, **sizes
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    token = TokenStep(ternc.quantize(model, ternc.Config(planes=1), inplace=True), places=8)
    compiled = compile_step(token, (torch.tensor([[0]]), torch.tensor([[0]])), tmp_path / "a.pt2")
    ids = torch.randint(64, (1, 7))
    with torch.no_grad():
        for _ in range(2):
            token(ids[:, :4], torch.arange(4)[None])
            for i in range(4, 7):
                found = compiled(ids[:, i : i + 1], torch.tensor([[i]]))
                wanted = model(input_ids=ids[:, : i + 1], use_cache=False).logits[:, -1:]
                torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
            token.reset()


def test_model_that_is_no_decoder():
    with pytest.raises(UnsupportedModelError, match="takes no position_ids"):
        TokenStep(nn.Linear(2, 2), 8)


class Broken(nn.Module):
    """A step that `forward` is put into."""

    def __init__(self, forward):
        super().__init__()
        self.layer, self.calls = nn.Linear(WIDTH, WIDTH), 0
        self.table = {(0, 1): torch.ones(WIDTH)}
        self._forward = forward

    def forward(this, x):  # any name will do
        return this._forward(this, x)


TABLE = torch.ones(WIDTH)


def counting(module, x):
    module.calls += 1
    return module.layer(x)


REFUSED = {
    "changes the module in Python": counting,
    "is not found again": lambda module, x: module.layer(x) * module.table[0, 1],
    "is no attribute of the module": lambda module, x: module.layer(x) * TABLE,
    "computes nothing": lambda module, x: 3,
    "returns dict": lambda module, x: {"y": module.layer(x)},
    "returns tuple": lambda module, x: (module.layer(x), x),
    "cannot be traced": lambda module, x: module.layer(x) if x.sum() > 0 else x,
}


@pytest.mark.filterwarnings("ignore")  # nor does a user who hides them get a step without these
@pytest.mark.parametrize("reason", REFUSED)
def test_steps_that_are_refused(reason, tmp_path):
    module = ternc.quantize(Broken(REFUSED[reason]), ternc.Config(planes=1))
    with pytest.raises(UnsupportedModelError, match=reason):
        compile_step(module, (torch.randn(1, WIDTH),), tmp_path / "step.pt2")


def test_arguments_that_are_refused(tmp_path):
    x, path = torch.randn(2, WIDTH), tmp_path / "step.pt2"
    with pytest.raises(InputError, match="has no packed layer"):
        compile_step(nn.Linear(WIDTH, WIDTH), (x,), path)
    module = cell()
    with pytest.raises(InputError, match="input 0 is no contiguous tensor"):
        compile_step(module, (x.t(),), path)
    with pytest.raises(InputError, match="given as two inputs"):
        compile_step(module, (x, x), path)
    with pytest.raises(InputError, match=r"does not end in \.pt2"):
        compile_step(module, (x,), tmp_path / "step.so")
    with pytest.raises(InputError, match="none is no folder"):
        compile_step(module, (x,), tmp_path / "none" / "step.pt2")
    with pytest.raises(InputError, match="input 1 is a tensor of the module"):
        compile_step(module, (x, module.count), path)
    with pytest.raises(InputError, match="not a sequence"):
        compile_step(module, x, path)
