"""A model saved, pickled or copied inside the block is the model as if it had never been watched."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from gradwatch import GradWatch
from tests.networks import NETWORKS, Training

PICKLABLE = ["mlp", "cnn_in_place", "batch_norm", "lstm", "transformer_encoder", "embedding_tied", "dict_and_dataclass_outputs"]


def saved(obj: object) -> bytes:
    stream = io.BytesIO()
    torch.save(obj, stream)
    return stream.getvalue()


def model_of(training: Training) -> nn.Module:
    (module,) = training.modules().values()
    return module


def trained(name: str) -> Training:
    training = NETWORKS[name]()
    training.run(2)
    return training


def both(name: str, dump: Callable[[Training], bytes]) -> tuple[bytes, bytes]:
    """What `dump` gives after the block and inside it. One training, not two: pickled storages are numbered by their address."""
    training = trained(name)
    with GradWatch(training.model, console=False):
        training.run(2)
        got = dump(training)
    expected = dump(training)
    assert dump(training) == expected, "the comparison needs a deterministic dump"
    return expected, got


@pytest.mark.parametrize("name", PICKLABLE)
def test_torch_save_inside_the_block_gives_the_unwatched_bytes(name: str) -> None:
    expected, got = both(name, lambda training: saved(model_of(training)))
    assert got == expected


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("name", ["mlp", "batch_norm", "dict_and_dataclass_outputs"])
def test_pickle_inside_the_block_gives_the_unwatched_bytes(name: str, protocol: int) -> None:
    expected, got = both(name, lambda training: pickle.dumps(model_of(training), protocol))
    assert got == expected


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_the_pure_python_pickler_gives_the_unwatched_bytes(protocol: int) -> None:
    def dump(training: Training) -> bytes:
        stream = io.BytesIO()
        pickle._Pickler(stream, protocol).dump(model_of(training))  # type: ignore[attr-defined]
        return stream.getvalue()

    expected, got = both("mlp", dump)
    assert got == expected


@pytest.mark.parametrize("name", ["mlp", "lstm", "embedding_sparse"])
def test_optimizer_and_checkpoint_inside_the_block_give_the_unwatched_bytes(name: str) -> None:
    def dump(training: Training) -> bytes:
        return saved(
            {
                "model": model_of(training).state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in training.optimizers],
                "whole": training.optimizers,
            }
        )

    expected, got = both(name, dump)
    assert got == expected


@pytest.mark.parametrize("name", PICKLABLE)
def test_a_whole_model_needs_no_further_safe_global(name: str) -> None:
    def dump(training: Training) -> bytes:
        return saved(model_of(training))

    needed = [set(torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data))) for data in both(name, dump)]
    assert needed[0] == needed[1]


def test_a_whole_model_saved_inside_the_block_loads_with_weights_only() -> None:
    safe = [nn.Sequential, nn.Linear, nn.Tanh, nn.GELU]
    expected, got = both("mlp", lambda training: saved(model_of(training)))
    with torch.serialization.safe_globals(safe):
        loaded = [torch.load(io.BytesIO(data), weights_only=True) for data in (expected, got)]
    x = torch.randn(3, 12)
    assert torch.equal(loaded[0](x), loaded[1](x))
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in loaded[1].modules())


def test_a_part_of_the_model_saved_inside_the_block_loads_with_weights_only() -> None:
    training = trained("mlp")
    model = model_of(training)
    assert isinstance(model, nn.Sequential)
    expected = saved(model[0])
    with GradWatch(model, console=False):
        assert saved(model[0]) == expected
        with torch.serialization.safe_globals([nn.Linear]):
            torch.load(io.BytesIO(saved(model[0])), weights_only=True)


def scale_output(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
    return output * 2


def test_the_users_own_hooks_are_saved_as_ever() -> None:
    training = trained("mlp")
    model = model_of(training)
    assert isinstance(model, nn.Sequential)
    model[0].register_forward_hook(scale_output)
    expected, x = pickle.dumps(model), torch.randn(3, 12)
    with GradWatch(model, console=False):
        training.run(2)
        model[2].register_forward_hook(scale_output)
        clone = pickle.loads(pickle.dumps(model))
        assert list(clone[0]._forward_hooks.values()) == [scale_output]
        assert list(clone[2]._forward_hooks.values()) == [scale_output]
        out = model(x)
    assert torch.equal(clone(x), out)
    assert list(model[0]._forward_hooks.values()) == [scale_output]
    assert len(expected) > 0


class Reduced(nn.Linear):
    """A user's module with a reduction of its own."""

    def __reduce_ex__(self, protocol: object) -> tuple[object, ...]:
        return (Reduced.rebuild, (self.in_features, self.out_features, dict(self.state_dict())))

    @staticmethod
    def rebuild(inputs: int, outputs: int, state: dict[str, Tensor]) -> Reduced:
        module = Reduced(inputs, outputs)
        module.load_state_dict(state)
        return module


class Stateful(nn.Linear):
    """A user's module that leaves something out of its pickle."""

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"cache": None}


@pytest.mark.parametrize("kind", [Reduced, Stateful])
def test_a_modules_own_way_of_pickling_is_kept(kind: type[nn.Linear]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(kind(4, 4), nn.ReLU(), nn.Linear(4, 1))
    model[0].cache = [1, 2, 3]  # type: ignore[assignment]
    expected = pickle.dumps(model, 2)
    with GradWatch(model, console=False):
        model(torch.randn(3, 4)).sum().backward()
        model.zero_grad()
        assert pickle.dumps(model, 2) == expected


def test_an_earlier_copyreg_entry_goes_on_working() -> None:
    import copyreg

    class Special(nn.Linear):
        pass

    def reduce(_module: Special) -> tuple[type[nn.Identity], tuple[()]]:
        return nn.Identity, ()

    copyreg.pickle(Special, reduce)  # type: ignore[arg-type]
    try:
        model = nn.Sequential(Special(4, 4), nn.Linear(4, 1))
        with GradWatch(model, console=False):
            assert isinstance(pickle.loads(pickle.dumps(model))[0], nn.Identity)
        assert copyreg.dispatch_table[Special] is reduce
    finally:
        del copyreg.dispatch_table[Special]


def test_two_watches_share_the_copyreg_entries() -> None:
    first, second = trained("mlp"), trained("mlp")
    expected = saved(model_of(second))
    with GradWatch(second.model, console=False):
        with GradWatch(first.model, console=False):
            pass
        assert saved(model_of(second)) == expected, "the second watch still needs what the first one gave back"


@pytest.mark.parametrize("name", ["mlp", "cnn_in_place", "lstm", "transformer_encoder", "embedding_tied"])
def test_a_deepcopy_inside_the_block_is_unwatched(name: str) -> None:
    training = trained(name)
    model = model_of(training)
    hooks = [sorted(vars(part)) for part in copy.deepcopy(model).modules()]
    with GradWatch(model, console=False) as watch:
        clone = copy.deepcopy(model)
        assert [sorted(vars(part)) for part in clone.modules()] == hooks
        assert not any(value for part in clone.modules() for key, value in vars(part).items() if "hook" in key)
        assert b"gradwatch" not in pickle.dumps(clone)
        training.run(2)
        clone = copy.deepcopy(model)
        recorded = watch.history.recorded
        optimizer = torch.optim.SGD(clone.parameters(), lr=0.1)
        for _ in range(3):
            sum(p.square().sum() for p in clone.parameters()).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert watch.history.recorded == recorded, "the copy's training is nobody's business"
        training.run(1)
        assert watch.history.recorded == recorded + 1
    assert not [a for a in watch.alerts if a.severity >= 30]


def test_an_average_of_the_weights_inside_the_block_stays_unwatched_and_equal() -> None:
    def average(training: Training) -> AveragedModel:
        ema = AveragedModel(model_of(training), multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
        for i in range(4):
            training.update(i)
            ema.update_parameters(model_of(training))
        return ema

    expected = average(trained("mlp")).state_dict()
    training = trained("mlp")
    with GradWatch(training.model, console=False) as watch:
        ema = average(training)
    torch.testing.assert_close(ema.state_dict(), expected, rtol=0, atol=0)
    assert b"gradwatch" not in pickle.dumps(ema.module)
    assert watch.history.recorded == 4
    assert not [a for a in watch.alerts if a.severity >= 30]


def test_the_watch_itself_is_not_in_what_is_saved() -> None:
    """What the comparison rests on: a hook of a watch would show in the bytes."""
    training = trained("mlp")
    model = model_of(training)
    bare = pickle.dumps(model)
    handle = model.register_forward_hook(scale_output)
    assert pickle.dumps(model) != bare
    assert b"scale_output" in pickle.dumps(model)
    handle.remove()
    with GradWatch(model, console=False):
        training.run(1)
        assert b"gradwatch" not in pickle.dumps(model)
