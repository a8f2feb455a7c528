"""Which parameters and modules are watched, under which names, and what happens when the model changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.nn.utils.parametrize import is_parametrized

from gradwatch.capture.parameters import ParameterTable, as_real, dense, materialised, named_modules, plain_name, unwrap
from tests.capture.tensors import made


class Block(nn.Module):
    """A parameter of its own, a child, and one that is not there."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.linear = nn.Linear(3, 3)
        self.register_parameter("nothing", None)
        self.register_module("no_child", None)
        self.register_buffer("count", torch.zeros(()))


def names(table: ParameterTable) -> list[str]:
    """The names of the columns, in order."""
    return [table.names[slot] for slot in table.column_slots]


def params(table: ParameterTable) -> list[Tensor]:
    return [table.params[slot] for slot in table.column_slots]


def table_of(model: nn.Module) -> ParameterTable:
    return ParameterTable({"": model})


def assert_sound(table: ParameterTable, models: dict[str, nn.Module]) -> None:
    """Slots, columns, names and identities agree with each other and with the models."""
    expected: dict[int, tuple[str, Tensor]] = {}
    for key, model in models.items():
        for name, p in unwrap(model).named_parameters():
            full = plain_name(f"{key}.{name}" if key else name)
            expected.setdefault(id(p), (full, p))
    assert names(table) == [name for name, _ in expected.values()]
    assert all(mine is theirs for mine, (_, theirs) in zip(params(table), expected.values(), strict=True))
    assert table.slot_of == {id(table.params[slot]): slot for slot in table.column_slots}
    assert len(table) == len(table.params) == len(table.names) == len(table.layers) == len(table.columns)
    assert sorted(c for c in table.columns if c >= 0) == list(range(len(expected)))
    assert table.in_order == (table.columns.tolist() == list(range(len(table))))
    for slot in table.column_slots:
        layer = table.modules[table.layers[slot]]
        made = layer.parametrizations.values() if is_parametrized(layer) else ()
        assert any(p is table.params[slot] for each in (layer, *made) for p in each._parameters.values())
    assert not table.changed()
    assert not table.thawed()


def test_what_a_parametrization_holds_belongs_to_the_layer_that_it_makes() -> None:
    inner = nn.Sequential(spectral_norm(nn.Linear(2, 3)), nn.ReLU())
    table = ParameterTable({"": inner, "critic": weight_norm(nn.Linear(3, 1))})
    assert dict(zip(table.names, table.layers, strict=True)) == {
        "0.bias": "0",
        "0.parametrizations.weight.original": "0",
        "critic.bias": "critic",
        "critic.parametrizations.weight.original0": "critic",
        "critic.parametrizations.weight.original1": "critic",
    }
    alone = ParameterTable({"": spectral_norm(nn.Linear(2, 3))})
    assert alone.layers == ["", ""]


# -- names -------------------------------------------------------------------------------------------------------------------------

MODELS: dict[str, tuple[Callable[[], dict[str, nn.Module]], list[str], list[str]]] = {
    "sequential": (
        lambda: {"": nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1, bias=False))},
        ["0.weight", "0.bias", "2.weight"],
        ["", "0", "1", "2"],
    ),
    "own-parameters-before-children": (
        lambda: {"": nn.Sequential(Block())},
        ["0.scale", "0.linear.weight", "0.linear.bias"],
        ["", "0", "0.linear"],
    ),
    "a-model-that-is-one-layer": (lambda: {"": nn.Linear(2, 1)}, ["weight", "bias"], [""]),
    "a-mapping": (
        lambda: {"generator": nn.Sequential(nn.Linear(2, 1, bias=False)), "discriminator": nn.Linear(1, 1)},
        ["generator.0.weight", "discriminator.weight", "discriminator.bias"],
        ["generator", "generator.0", "discriminator"],
    ),
    "frozen-parts-have-columns": (
        lambda: {"": nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 1))},
        ["0.weight", "0.bias", "1.weight", "1.bias"],
        ["", "0", "1"],
    ),
    "lists-and-dicts": (
        lambda: {"": nn.ModuleDict({"a": nn.ModuleList([nn.Linear(1, 1)]), "b": nn.ParameterList([torch.zeros(2)])})},
        ["a.0.weight", "a.0.bias", "b.0"],
        ["", "a", "a.0", "b"],
    ),
}


@pytest.mark.parametrize(("make", "parameters", "layers"), MODELS.values(), ids=MODELS)
def test_names_are_those_of_the_model_in_registration_order(
    make: Callable[[], dict[str, nn.Module]], parameters: list[str], layers: list[str]
) -> None:
    models = make()
    table = ParameterTable(models)
    assert names(table) == parameters
    assert list(table.modules) == layers
    assert_sound(table, models)


def tied() -> nn.Module:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5)})
    model["head"].weight = model["embed"].weight
    return model


def test_a_tied_parameter_has_one_column_under_its_first_name() -> None:
    table = table_of(tied())
    assert names(table) == ["embed.weight", "head.bias"]
    assert [table.layers[slot] for slot in table.column_slots] == ["embed", "head"]


def test_a_module_that_stands_twice_has_one_name() -> None:
    layer = nn.Linear(2, 2)
    table = table_of(nn.Sequential(layer, nn.ReLU(), layer))
    assert names(table) == ["0.weight", "0.bias"]
    assert list(table.modules) == ["", "0", "1"]


def test_a_module_that_two_models_share_stands_under_the_first() -> None:
    shared = nn.Linear(2, 2)
    table = ParameterTable({"a": nn.Sequential(shared), "b": nn.Sequential(nn.Linear(1, 1), shared)})
    assert names(table) == ["a.0.weight", "a.0.bias", "b.0.weight", "b.0.bias"]
    assert list(table.modules) == ["a", "a.0", "b", "b.0"]


def test_a_name_that_looks_like_a_wrappers_in_part_is_the_users() -> None:
    model = nn.ModuleDict({"my_orig_mod": nn.Linear(1, 1, bias=False), "module": nn.Linear(1, 1, bias=False)})
    assert names(table_of(model)) == ["my_orig_mod.weight", "module.weight"]


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        pytest.param("0.weight", "0.weight", id="plain"),
        pytest.param("", "", id="root"),
        pytest.param("_orig_mod.0.weight", "0.weight", id="compiled-root"),
        pytest.param("blocks.3._orig_mod.fc.weight", "blocks.3.fc.weight", id="compiled-block"),
        pytest.param("_fsdp_wrapped_module.a._fsdp_wrapped_module.w", "a.w", id="fsdp"),
        pytest.param("a._checkpoint_wrapped_module.w", "a.w", id="checkpointed"),
        pytest.param("_orig_mod", "", id="only-a-wrapper"),
        pytest.param("module.a_b.weight_v", "module.a_b.weight_v", id="the-users-underscores"),
    ],
)
def test_wrapper_segments_are_left_out(name: str, plain: str) -> None:
    assert plain_name(name) == plain


# -- wrappers ----------------------------------------------------------------------------------------------------------------------


class DistributedDataParallel(nn.Module):
    """Stands in for torch's of the same name, which needs a process group."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class Wrapper(nn.Module):
    """A user's own module that happens to hold another one as `module`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 1)))


def compiled(model: nn.Module) -> nn.Module:
    wrapped: nn.Module = torch.compile(model, backend="eager")  # type: ignore[assignment]
    return wrapped


def with_compiled_part(model: nn.Module) -> nn.Module:
    model[1] = compiled(model[1])  # type: ignore[operator, index]
    return model


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compile": compiled,
    "compile-in-place": compiled_in_place,
    "ddp": DistributedDataParallel,
    "ddp-of-compile": lambda m: DistributedDataParallel(compiled(m)),
    "compile-of-ddp": lambda m: compiled(DistributedDataParallel(m)),
    "compiled-part": with_compiled_part,
    "checkpointed": checkpoint_wrapper,
    "checkpointed-part": lambda m: nn.Sequential(m[0], checkpoint_wrapper(m[1])),  # type: ignore[index]
    "compile-of-checkpointed": lambda m: compiled(checkpoint_wrapper(m)),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_names_are_those_of_the_unwrapped_model(wrap: Callable[[nn.Module], nn.Module]) -> None:
    expected = table_of(plain())
    table = table_of(wrap(plain()))
    assert names(table) == names(expected)
    assert list(table.modules) == list(expected.modules)
    assert [type(m).__name__ for m in table.modules.values()] == [type(m).__name__ for m in expected.modules.values()]
    mapped = ParameterTable({"key": wrap(plain())})
    assert names(mapped) == [f"key.{name}" for name in names(expected)]
    assert list(mapped.modules) == ["key" if not name else f"key.{name}" for name in expected.modules]


def test_a_users_module_is_no_wrapper() -> None:
    model = Wrapper(nn.Linear(1, 1))
    assert unwrap(model) is model
    assert names(table_of(model)) == ["module.weight", "module.bias"]


def test_unwrapping_gives_the_users_model() -> None:
    model = plain()
    assert unwrap(model) is model
    assert unwrap(DistributedDataParallel(compiled(model))) is model
    assert dict(named_modules({"": compiled(model)}))[""] is model


# -- a model that changes ----------------------------------------------------------------------------------------------------------


def add_layer(model: nn.Sequential) -> None:
    model.append(nn.Linear(1, 1))


def insert_layer(model: nn.Sequential) -> None:
    model.insert(0, nn.Linear(2, 2))


def replace_parameter(model: nn.Sequential) -> None:
    model[0].weight = nn.Parameter(torch.ones(2, 2))


def replace_module(model: nn.Sequential) -> None:
    model[0] = nn.Linear(2, 2)


def remove_module(model: nn.Sequential) -> None:
    del model[0]


def remove_parameter(model: nn.Sequential) -> None:
    model[0].bias = None


def add_parameter(model: nn.Sequential) -> None:
    model[0].gate = nn.Parameter(torch.zeros(3))


def add_to_an_empty_module(model: nn.Sequential) -> None:
    model[1].alpha = nn.Parameter(torch.zeros(3))


def add_below_an_empty_module(model: nn.Sequential) -> None:
    model[1].inner = nn.Linear(1, 1)


def tie(model: nn.Sequential) -> None:
    model[2].bias = model[0].bias


def exchange(model: nn.Sequential) -> None:
    model[0], model[2] = model[2], model[0]


def parametrize(model: nn.Sequential) -> None:
    nn.utils.parametrizations.weight_norm(model[0])


def empty_it(model: nn.Sequential) -> None:
    while len(model):
        del model[-1]


CHANGES: list[Callable[[nn.Sequential], None]] = [
    add_layer,
    insert_layer,
    replace_parameter,
    replace_module,
    remove_module,
    remove_parameter,
    add_parameter,
    add_to_an_empty_module,
    add_below_an_empty_module,
    tie,
    exchange,
    parametrize,
    empty_it,
]


@pytest.mark.parametrize("change", CHANGES, ids=[change.__name__.replace("_", "-") for change in CHANGES])
def test_a_change_is_seen_and_known_parameters_keep_their_slots(change: Callable[[nn.Sequential], None]) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    table = table_of(model)
    assert not table.changed()
    before = list(table.params)
    change(model)
    assert table.changed()
    table.rescan()
    assert_sound(table, {"": model})
    assert all(old is new for old, new in zip(before, table.params, strict=False)), "a slot never changes its parameter"
    change_again = nn.Linear(1, 1)
    model.append(change_again)
    assert table.changed()
    table.rescan()
    assert_sound(table, {"": model})


UNCHANGED: dict[str, Callable[[nn.Sequential], object]] = {
    "training": lambda m: m.eval(),
    "gradient": lambda m: setattr(m[0].weight, "grad", torch.ones(2, 2)),
    "data": lambda m: setattr(m[0].weight, "data", torch.ones(2, 2)),
    "load": lambda m: m.load_state_dict(m.state_dict()),
    "double": lambda m: m.double(),
    "buffer": lambda m: m[0].register_buffer("b", torch.ones(1)),
    "attribute": lambda m: setattr(m[0], "note", "x"),
    "hook": lambda m: m[0].register_forward_hook(lambda *_: None),
}


@pytest.mark.parametrize("do", UNCHANGED.values(), ids=UNCHANGED)
def test_what_changes_no_parameter_object_is_no_change(do: Callable[[nn.Sequential], object]) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    table = table_of(model)
    do(model)
    assert not table.changed()


def test_a_parameter_that_comes_back_gets_its_column_again() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    table = table_of(model)
    first = model[0]
    model[0] = nn.Identity()
    table.rescan()
    assert names(table) == ["1.weight", "1.bias"]
    model[0] = first
    table.rescan()
    assert names(table) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert_sound(table, {"": model})


def test_the_address_of_a_dead_parameter_is_not_mistaken_for_it() -> None:
    """`id` of a parameter that was replaced may be given to the next one."""
    model = nn.Linear(2, 2)
    table = table_of(model)
    for _ in range(20):
        model.weight = nn.Parameter(torch.ones(2, 2))
        table.rescan()
        assert_sound(table, {"": model})


def test_freezing_and_thawing_are_seen() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    table = table_of(model)
    for flag in (False, True):
        model[0].requires_grad_(flag)
        assert table.thawed()
        assert not table.changed()
        table.rescan()
        assert not table.thawed()


def test_a_lazy_parameter_has_a_column_and_its_materialising_is_a_change() -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 1))
    table = table_of(model)
    assert names(table) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert not table.changed()
    slot = table.column_slots[0]
    assert not materialised(table.params[slot])
    model(torch.zeros(1, 2))
    assert table.changed()
    table.rescan()
    assert_sound(table, {"": model})
    assert materialised(table.params[table.column_slots[0]])


# -- kinds of tensors --------------------------------------------------------------------------------------------------------------


def kinds() -> Iterator[tuple[str, Tensor, Tensor]]:
    index = torch.tensor([[0, 2, 0]])
    yield "strided", torch.ones(3), torch.ones(3)
    yield (
        "sparse",
        torch.sparse_coo_tensor(index, torch.tensor([1.0, 2.0, 3.0]), (4,), check_invariants=True),
        torch.tensor([4.0, 2.0]),
    )
    yield (
        "hybrid",
        torch.sparse_coo_tensor(index, torch.ones(3, 2), (4, 2), check_invariants=True),
        torch.tensor([[2.0, 2], [1, 1]]),
    )


@pytest.mark.parametrize(("tensor", "values"), [pytest.param(t, v, id=name) for name, t, v in kinds()])
def test_the_values_of_a_sparse_tensor_are_summed(tensor: Tensor, values: Tensor) -> None:
    assert torch.equal(dense(tensor), values)


def test_complex_values_are_pairs() -> None:
    z = torch.tensor([1 + 2j, 3 - 4j])
    assert as_real(z).tolist() == [[1, 2], [3, -4]]
    assert as_real(z.conj()).tolist() == [[1, -2], [3, 4]]
    real = made((3,), torch.float32, "contiguous")
    assert as_real(real) is real


@pytest.mark.parametrize(
    ("tensor", "there"),
    [
        pytest.param(torch.zeros(2), True, id="plain"),
        pytest.param(torch.zeros(0), True, id="empty"),
        pytest.param(torch.zeros(2, device="meta"), False, id="meta"),
        pytest.param(nn.UninitializedParameter(), False, id="lazy"),
    ],
)
def test_what_can_be_read(tensor: Tensor, there: bool) -> None:
    assert materialised(tensor) is there


def test_a_model_without_parameters_is_an_empty_table() -> None:
    table = table_of(nn.Sequential(nn.ReLU()))
    assert len(table) == 0
    assert table.column_slots == []
    assert table.columns.dtype == np.int64
    assert not table.changed()
