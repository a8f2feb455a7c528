"""Whatever saves, pickles or copies a module with our hooks gives what it gives without them."""

from __future__ import annotations

import copy
import copyreg
import io
import pickle
import threading
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim.swa_utils import AveragedModel
from torch.utils.hooks import RemovableHandle

from gradwatch.capture import copying
from gradwatch.capture.copying import Ours, enter, leave
from gradwatch.capture.private import HOOK_DICTIONARIES

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
KEY = "ours"


class Cell(Ours):
    """Hooks such as a watch's."""

    __slots__ = ("calls",)

    def __init__(self) -> None:
        self.calls: list[str] | None = []

    def before(self, module: nn.Module, args: object) -> None:
        if self.calls is not None:
            self.calls.append("before")

    def after(self, module: nn.Module, args: object, output: object) -> None:
        if self.calls is not None:
            self.calls.append("after")


@contextmanager
def hooked(model: nn.Module) -> Iterator[Cell]:
    """Our hooks in every module, first in every dictionary, and nothing that leaves them out."""
    cell, modules = Cell(), list(model.modules())
    for module in modules:
        module._forward_hooks[KEY] = cell.after  # type: ignore[index]
        module._forward_pre_hooks[KEY] = cell.before  # type: ignore[index]
        for names in HOOK_DICTIONARIES.values():
            for name in names[1:]:
                vars(module)[name][KEY] = True
        for name in HOOK_DICTIONARIES:
            vars(module)[name].move_to_end(KEY, last=False)
    try:
        yield cell
    finally:
        for module in modules:
            for name, companions in HOOK_DICTIONARIES.items():
                for each in (name, *companions):
                    vars(module)[each].pop(KEY, None)


def classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


@contextmanager
def watched(model: nn.Module) -> Iterator[Cell]:
    """Our hooks in every module, and left out of what leaves."""
    owner = object()
    enter(owner, classes(model))
    try:
        with hooked(model) as cell:
            yield cell
    finally:
        leave(owner)


def keys_of(model: nn.Module) -> set[object]:
    """The keys of all hooks in a model."""
    names = [each for name, companions in HOOK_DICTIONARIES.items() for each in (name, *companions)]
    return {key for module in model.modules() for name in names for key in vars(module)[name]}


def saved(model: object) -> bytes:
    stream = io.BytesIO()
    torch.save(model, stream)
    return stream.getvalue()


def pickled_slowly(model: object, protocol: int) -> bytes:
    stream = io.BytesIO()
    pickle._Pickler(stream, protocol).dump(model)
    return stream.getvalue()


# -- the models --------------------------------------------------------------------------------------------------------------------


def double(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
    return output * 2


def first(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    return None


class Hooking(nn.Module):
    """Hooks of the user's: functions, a method of its own, with keyword arguments, and their handles."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 1)
        self.count = 0
        self.early = self.one.register_forward_pre_hook(first, with_kwargs=True)
        self.handles = [self.one.register_forward_hook(double), self.two.register_forward_hook(self.counted, always_call=True)]
        self.own = self.register_forward_hook(double)

    def counted(self, _module: nn.Module, _args: object, _output: Tensor) -> None:
        self.count += 1

    def forward(self, x: Tensor) -> Any:
        return self.two(self.one(x))


class Late(nn.Linear):
    """The handle comes in `__dict__` before the dictionaries that it refers to."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        hooks = self.__dict__.pop("_forward_hooks")
        self.handle = RemovableHandle(hooks)
        hooks[self.handle.id] = double
        self.__dict__["_forward_hooks"] = hooks


class Stateful(nn.Linear):
    """A `__getstate__` and `__setstate__` of its own."""

    cache: object = None

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"cache": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self.cache = "restored"


class Tupled(nn.Linear):
    """A state that is a tuple."""

    def __getstate__(self) -> tuple[object, ...]:
        return "version 1", self.__dict__.copy()

    def __setstate__(self, state: tuple[str, dict[str, object]]) -> None:
        self.__dict__.update(state[1])


class Weights(nn.Linear):
    """A state that is nothing we know."""

    def __getstate__(self) -> list[object]:
        return [self.weight, self.bias]

    def __setstate__(self, state: list[Any]) -> None:
        nn.Linear.__init__(self, 4, 4)
        self.weight, self.bias = state


class Slotted(nn.Linear):
    """With a slot."""

    __slots__ = ("extra",)

    def __init__(self) -> None:
        super().__init__(4, 4)
        object.__setattr__(self, "extra", 7)

    def __getstate__(self) -> Any:
        return self.__dict__, {"extra": self.extra}

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state[0])  # type: ignore[no-untyped-call]
        object.__setattr__(self, "extra", state[1]["extra"])


def rebuilt(cls: type[nn.Module], state: dict[str, object]) -> nn.Module:
    module = cls.__new__(cls)
    module.__dict__.update(state)
    return module


class Reduced(nn.Linear):
    """A `__reduce__`, with the whole of it as an argument."""

    def __reduce__(self) -> tuple[Any, ...]:
        return rebuilt, (type(self), self.__dict__)


class ReducedEx(nn.Linear):
    """A `__reduce_ex__` that asks nobody, and uses the protocol."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return rebuilt, (type(self), self.__dict__ | {"protocol": protocol})


class ReducedFurther(ReducedEx):
    """And one that asks its base."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return super().__reduce_ex__(protocol)


class Behind:
    """A base behind `nn.Module` with a `__reduce_ex__`."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return rebuilt, (type(self), self.__dict__ | {"behind": True})


class WithBehind(nn.Linear, Behind):
    pass


class Meta(type):
    """Its classes cannot be changed."""

    def __setattr__(cls, name: str, value: object) -> None:
        raise TypeError("no")

    def __delattr__(cls, name: str) -> None:
        raise TypeError("no")


class Frozen(nn.Linear, metaclass=Meta):
    def __reduce_ex__(self, protocol: Any) -> Any:
        return super().__reduce_ex__(protocol)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.again = self.head

    def forward(self, x: Tensor) -> Any:
        return self.again(self.embedding(x))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "sequential": lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.BatchNorm1d(4), nn.Linear(4, 1)),
    "lstm": lambda: nn.LSTM(4, 3, num_layers=2),
    "attention": lambda: nn.MultiheadAttention(4, 2),
    "encoder": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8), 2, enable_nested_tensor=False),
    "hooking": Hooking,
    "late": Late,
    "stateful": lambda: nn.Sequential(Stateful(4, 4), nn.ReLU()),
    "tupled": lambda: nn.Sequential(Tupled(4, 4), nn.ReLU()),
    "weights": lambda: nn.Sequential(Weights(4, 4), nn.ReLU()),
    "slotted": lambda: nn.Sequential(Slotted(), nn.ReLU()),
    "reduced": lambda: nn.Sequential(Reduced(4, 4), nn.ReLU()),
    "reduced_ex": lambda: nn.Sequential(ReducedEx(4, 4), nn.ReLU()),
    "reduced_further": lambda: nn.Sequential(ReducedFurther(4, 4), ReducedEx(4, 4)),
    "with_behind": lambda: nn.Sequential(WithBehind(4, 4), nn.ReLU()),
    "frozen": lambda: nn.Sequential(Frozen(4, 4), nn.ReLU()),
    "tied": Tied,
    "averaged": lambda: AveragedModel(nn.Sequential(nn.Linear(4, 4), nn.Tanh())),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return MODELS[request.param]()


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """After every test all is as it was before it."""
    table = dict(copyreg.dispatch_table)
    yield
    assert copyreg.dispatch_table.items() >= table.items()
    assert not [cls for cls, reduce in copyreg.dispatch_table.items() if getattr(reduce, "__module__", "") == copying.__name__]
    assert "__reduce_ex__" not in vars(nn.Module)
    assert "__reduce_ex__" not in vars(RemovableHandle)
    assert not copying._taken
    assert not copying._entered


# -- bytes -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dump", [pickle.dumps, pickled_slowly], ids=["c", "python"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_pickle_has_the_unwatched_bytes(model: nn.Module, protocol: int, dump: Callable[[object, int], bytes]) -> None:
    expected = dump(model, protocol)
    with watched(model):
        assert dump(model, protocol) == expected
        assert KEY in keys_of(model), "the model keeps them"
    assert dump(model, protocol) == expected


def test_torch_save_gives_the_unwatched_bytes(model: nn.Module) -> None:
    expected = saved(model)
    needed = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(expected))
    with watched(model):
        assert saved(model) == expected
        assert sorted(torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(saved(model)))) == sorted(needed)


def test_torch_save_in_the_old_format_gives_the_unwatched_bytes(model: nn.Module) -> None:
    def dump() -> bytes:
        stream = io.BytesIO()
        torch.save(model, stream, _use_new_zipfile_serialization=False)
        return stream.getvalue()

    expected = dump()
    with watched(model):
        assert dump() == expected


@pytest.mark.parametrize("name", ["sequential", "hooking", "reduced", "reduced_ex"])
def test_without_it_our_hooks_would_be_saved(name: str) -> None:
    """What the comparisons rest on."""
    model = MODELS[name]()
    bare = pickle.dumps(model)
    with hooked(model):
        assert b"\x8c\x04Cell" in pickle.dumps(model)
        assert KEY in keys_of(copy.deepcopy(model))
        assert torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(saved(model)))
    assert pickle.dumps(model) == bare


def test_a_whole_model_loads_with_weights_only_and_no_further_safe_global() -> None:
    model = MODELS["sequential"]()
    with watched(model):
        data = saved(model)
    with torch.serialization.safe_globals([nn.Sequential, nn.Linear, nn.ReLU, nn.BatchNorm1d]):
        loaded = torch.load(io.BytesIO(data), weights_only=True)
    assert not keys_of(loaded)
    x = torch.randn(3, 4)
    assert torch.equal(loaded(x), model(x))


def test_a_part_is_saved_and_a_checkpoint_with_the_model_in_it() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    checkpoint = {"model": model, "part": model[0], "state": model.state_dict(), "hook": double}
    expected = saved(model[0]), saved(checkpoint)
    with watched(model):
        assert (saved(model[0]), saved(checkpoint)) == expected


def test_a_module_class_of_another_model_comes_out_clean_too() -> None:
    """One that is first seen in the middle of a run, or that a module takes on then."""

    class Other(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 4))
    with watched(model) as cell:
        model.append(Other(4, 4))
        vars(model[1])["_forward_hooks"][KEY] = cell.after
        assert KEY not in keys_of(copy.deepcopy(model))


# -- copies ------------------------------------------------------------------------------------------------------------------------


def shape(model: nn.Module) -> list[object]:
    """What there is in each module, and how many of each kind of hook."""
    return [{key: len(value) if "hooks" in key else None for key, value in vars(module).items()} for module in model.modules()]


def test_a_deepcopy_carries_no_hook_of_ours(model: nn.Module) -> None:
    expected = copy.deepcopy(model)
    with watched(model) as cell:
        clone = copy.deepcopy(model)
        assert shape(clone) == shape(expected)
        assert KEY not in keys_of(clone)
        assert KEY in keys_of(model)
    assert pickle.dumps(clone)
    assert cell.calls == []
    for (name, got), (_, want) in zip(clone.state_dict().items(), expected.state_dict().items(), strict=True):
        assert torch.equal(torch.as_tensor(got), torch.as_tensor(want)), name


def test_ties_are_kept() -> None:
    model = Tied()
    with watched(model):
        clones = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for clone in clones:
        assert clone.head.weight is clone.embedding.weight
        assert clone.again is clone.head


@pytest.mark.parametrize("clone_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_the_users_hooks_live_on_in_a_copy(clone_of: Callable[[Hooking], Hooking]) -> None:
    model, x = Hooking(), torch.randn(2, 4)
    with watched(model):
        clone = clone_of(model)
        expected = model(x)
    assert model.count == 1
    assert torch.equal(clone(x), expected)
    assert clone.count == 1, "a bound method of the model is one of the copy"
    assert model.count == 1
    assert list(clone.one._forward_pre_hooks_with_kwargs) == [clone.early.id]
    assert list(clone.two._forward_hooks_always_called) == [clone.handles[1].id]


@pytest.mark.parametrize("clone_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_the_users_handles_in_a_copy_remove_its_hooks(clone_of: Callable[[Any], Any]) -> None:
    model = nn.ModuleList([Hooking(), Late()])
    with watched(model):
        clone = clone_of(model)
    for handle in (clone[0].early, clone[0].own, *clone[0].handles, clone[1].handle):
        handle.remove()
    assert not keys_of(clone)
    assert keys_of(model)


def test_an_average_of_the_weights_is_unwatched() -> None:
    model = MODELS["hooking"]()
    with watched(model):
        average = AveragedModel(model)
        average.update_parameters(model)
        assert KEY not in keys_of(average)
        with watched(average):
            expected = pickle.dumps(average)
        assert pickle.dumps(average) == expected


@pytest.mark.parametrize("kind", [nn.Linear, ReducedEx])
def test_a_shallow_copy_shares_the_hooks_as_ever(kind: type[nn.Linear]) -> None:
    model = kind(4, 4)
    with watched(model):
        clone = copy.copy(model)
        assert clone._forward_hooks is model._forward_hooks
        assert clone.weight is model.weight
        assert KEY not in keys_of(copy.deepcopy(clone))
    handle = model.register_forward_hook(double)
    assert keys_of(clone) == keys_of(model) == {handle.id}, "ours went out of both"


def test_a_replica_shares_the_hooks_as_ever() -> None:
    model = nn.Linear(4, 4)
    with watched(model):
        replica = model._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        assert replica._forward_hooks is model._forward_hooks
    assert not keys_of(replica)


def test_a_parametrized_module_is_deepcopied_without_our_hooks() -> None:
    """Its class has a `__deepcopy__`, which copies all there is."""
    model: Any = nn.Sequential(spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 1))
    model[0].count = 0
    model[0].handle = model[0].register_forward_hook(double)
    model[0].register_forward_hook(types.MethodType(counting, model[0]))
    cls = type(model[0])
    before = vars(cls)["__deepcopy__"]
    with watched(model):
        clone = copy.deepcopy(model)
        with pytest.raises(RuntimeError, match="parametrized"):
            pickle.dumps(model)
    assert vars(cls)["__deepcopy__"] is before
    assert keys_of(clone) == keys_of(model)
    model.eval(), clone.eval()
    x = torch.randn(2, 4)
    assert torch.equal(clone(x), model(x))
    assert clone[0].count == model[0].count == 1
    clone[0].handle.remove()
    assert len(keys_of(clone)) == 1


def counting(self: Any, _module: nn.Module, _args: object, _output: object) -> None:
    self.count += 1


def test_a_module_that_is_its_own_copy_keeps_its_hooks() -> None:
    class Single(nn.Linear):
        def __deepcopy__(self, memo: object) -> Single:
            return self

    model: Any = nn.Sequential(Single(4, 4))
    model[0].lock = threading.Lock()  # that no deepcopy takes
    lock = model[0].register_forward_hook(types.MethodType(counting, threading.Lock()))
    with watched(model):
        assert copy.deepcopy(model)[0] is model[0]
        assert keys_of(model) == {KEY, lock.id}


def test_a_graph_module_is_saved_and_copied_as_ever() -> None:
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    expected = pickle.dumps(traced)
    with watched(traced):
        assert pickle.dumps(traced) == expected
        assert KEY not in keys_of(copy.deepcopy(traced))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_script_module_is_copied_and_refused_as_ever() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(2, 4)
    scripted = torch.jit.script(model)
    owner = object()
    enter(owner, classes(scripted))
    try:
        with pytest.raises(RuntimeError, match="__getstate__"):
            pickle.dumps(scripted)
        assert torch.equal(copy.deepcopy(scripted)(x), model(x))
        assert torch.jit.script(nn.Sequential(nn.Linear(4, 4)))(torch.ones(1, 4)).shape == (1, 4)
    finally:
        leave(owner)


def test_a_copy_of_a_hook_by_another_way_does_nothing() -> None:
    """The second line: somebody copies or pickles the dictionaries themselves."""
    model = nn.Linear(4, 4)
    with watched(model) as cell:
        copies = copy.deepcopy(vars(model)), pickle.loads(pickle.dumps(vars(model)))
        for copied in copies:
            hook = copied["_forward_hooks"][KEY]
            assert type(hook.__self__) is Cell
            assert hook.__self__ is not cell
            assert hook.__self__.calls is None
            assert hook(model, (), None) is None
    assert cell.calls == []


# -- what nothing may break --------------------------------------------------------------------------------------------------------


def test_a_class_that_raises_goes_on_raising_the_same() -> None:
    class Refusing(nn.Linear):
        def __reduce_ex__(self, protocol: object) -> Any:
            raise ValueError("not this one")

    class Nameless(nn.Linear):
        __reduce_ex__: ClassVar[Any] = None

    for model, error, match in ((Refusing(4, 4), ValueError, "not this one"), (Nameless(4, 4), TypeError, "NoneType")):
        with watched(model), pytest.raises(error, match=match):
            pickle.dumps(model)


def single() -> nn.Module:
    return SINGLE


class Global(nn.Linear):
    """Reduced to a name."""

    def __reduce__(self) -> str:
        return "SINGLE"


SINGLE = Global(4, 4)


def test_a_module_that_is_a_global_stays_one() -> None:
    with watched(SINGLE):
        assert pickle.loads(pickle.dumps(SINGLE)) is SINGLE
        assert copy.deepcopy(SINGLE) is SINGLE


def test_a_hook_of_a_dead_proxy_is_not_asked_for_its_class() -> None:
    class Owner:
        def hook(self, *_: object) -> None: ...

    model = nn.Linear(4, 4)
    owner = Owner()
    model.register_forward_hook(types.MethodType(Owner.hook, weakref.proxy(owner)))
    del owner
    with watched(model):
        state: Any = model.__reduce_ex__(2)[2]
        assert KEY not in state["_forward_hooks"]
        assert len(state["_forward_hooks"]) == 1


def test_a_dictionary_of_the_users_own_kind_is_left_alone() -> None:
    class Own(OrderedDict[Any, Any]):
        def copy(self) -> Any:
            raise AssertionError("not ours to copy")

    model = nn.Linear(4, 4)
    model._forward_hooks = Own()
    with watched(model):
        assert not copy.deepcopy(model)._forward_pre_hooks


def test_the_copies_of_dictionaries_last_no_longer_than_the_pickle() -> None:
    model = Hooking()
    with watched(model):
        pickle.dumps(model)
        copy.deepcopy(model)
        assert not copying._copies
        handle = model.one.register_forward_hook(double)
        changed = copy.deepcopy(model)
        assert handle.id in keys_of(changed)
        handle.remove()
        assert handle.id not in keys_of(copy.deepcopy(model))


def test_compiled_code_is_not_compiled_again() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), torch.randn(2, 4)
    frames: list[object] = []

    def backend(graph: torch.fx.GraphModule, _inputs: object) -> Any:
        frames.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    compiled(x)
    enter(model, classes(model))
    compiled(x)
    leave(model)
    compiled(x)
    assert len(frames) == 1
    torch.compiler.reset()


# -- in and out --------------------------------------------------------------------------------------------------------------------


def special(module: nn.Module) -> tuple[Any, ...]:
    return rebuilt, (type(module), vars(module) | {"special": True})


class Special(nn.Linear):
    pass


@pytest.fixture
def earlier() -> Iterator[Callable[..., Any]]:
    """An entry of the user's in `copyreg`'s table."""
    copyreg.pickle(Special, special)
    yield special
    del copyreg.dispatch_table[Special]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_earlier_entry_goes_on_working(earlier: Callable[..., Any], protocol: int) -> None:
    model: Any = nn.Sequential(Special(4, 4), nn.Linear(4, 1))
    expected = pickle.dumps(model, protocol)
    with watched(model):
        assert pickle.dumps(model, protocol) == expected
        assert copy.deepcopy(model)[0].special is True
        assert KEY not in keys_of(copy.deepcopy(model))
        assert copy.copy(model[0])._forward_hooks is model[0]._forward_hooks
    assert copyreg.dispatch_table[Special] is earlier


def test_an_entry_that_came_later_is_not_taken_out(earlier: Callable[..., Any]) -> None:
    model: Any = Special(4, 4)
    with watched(model):
        ours = copyreg.dispatch_table[Special]
        later = lambda module: ours(module)  # noqa: E731
        copyreg.dispatch_table[Special] = later
        assert KEY not in keys_of(copy.deepcopy(model))
    assert copyreg.dispatch_table[Special] is later
    assert copy.deepcopy(model).special is True, "and ours goes on working in its chain"


def test_two_watches_share_a_class() -> None:
    one, two = nn.Sequential(nn.Linear(4, 4), ReducedEx(4, 4)), nn.Sequential(nn.Linear(4, 1), ReducedEx(4, 4))
    before = vars(ReducedEx)["__reduce_ex__"]
    expected = pickle.dumps(two)
    with watched(two):
        with watched(one):
            assert pickle.dumps(two) == expected
        assert pickle.dumps(two) == expected, "the second still needs what the first gave back"
        assert vars(ReducedEx)["__reduce_ex__"] is not before
    assert vars(ReducedEx)["__reduce_ex__"] is before


def test_attached_again_and_again_nothing_piles_up() -> None:
    model = MODELS["reduced_further"]()
    before = vars(ReducedEx)["__reduce_ex__"], vars(ReducedFurther)["__reduce_ex__"]
    expected = pickle.dumps(model)
    for _ in range(50):
        with watched(model):
            assert pickle.dumps(model) == expected
    assert (vars(ReducedEx)["__reduce_ex__"], vars(ReducedFurther)["__reduce_ex__"]) == before


def test_to_leave_what_was_not_entered_does_nothing() -> None:
    one, other = object(), object()
    leave(one)
    enter(one, [nn.Linear])
    leave(other)
    assert copying._taken
    leave(one)


def test_threads_enter_and_leave_at_once() -> None:
    model = MODELS["reduced_further"]()
    expected = pickle.dumps(model)
    wrong: list[object] = []

    def work() -> None:
        mine = object()
        for _ in range(100):
            enter(mine, classes(model))
            if pickle.dumps(model) != expected:
                wrong.append("bytes")
            leave(mine)

    with watched(model):
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not wrong
        assert pickle.dumps(model) == expected
