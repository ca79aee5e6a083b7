"""Batches: what is in them, what they depend on, how they resume and how they are shared out."""

import itertools

import numpy as np
import pytest

from tokred.data.pipeline import eval_batches, train_batches

pytest.importorskip("grain")
SIZE = 37


class Numbers:
    """Example i is the number i."""

    def __init__(self, size=SIZE):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return {"number": index}


def draw(example, rng):
    """An image whose pixels are random draws, with the number as the label."""
    image = rng.random((4, 4, 1), np.float32)
    return {"image": image, "label": np.int32(example["number"]), "mask": image[..., 0] > 0.5}


def train(**options):
    return train_batches(Numbers(), draw, **{"batch": 8, "seed": 0, **options})


def evaluate(size=SIZE, **options):
    return eval_batches(Numbers(size), draw, **{"batch": 8, "seed": 0, **options})


def take(batches, count):
    return list(itertools.islice(batches, count))


def assert_same(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def join(shards):
    """Global batches: those of all processes, one after another."""
    return [
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for parts in zip(*shards, strict=True)
    ]


THREADS = [{"num_threads": 0}, {"num_threads": 1, "prefetch": 2}, {"num_threads": 2, "prefetch": 4}]


def test_shapes_and_dtypes():
    batch = next(train())
    assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {
        "image": ((8, 4, 4, 1), np.float32),
        "label": ((8,), np.int32),
        "mask": ((8, 4, 4), np.bool_),
        "id": ((8,), np.int32),
    }


@pytest.mark.parametrize("make", [train, evaluate])
def test_ids_are_the_indices_in_the_source(make):
    for batch in take(make(), 5):
        np.testing.assert_array_equal(batch["id"], batch["label"])
        assert batch["id"].dtype == np.int32


@pytest.mark.parametrize("options", THREADS)
def test_a_seed_fixes_everything_at_any_number_of_threads(options):
    assert_same(take(train(), 12), take(train(**options), 12))
    assert_same(list(evaluate()), list(evaluate(**options)))


def test_another_seed_changes_order_and_draws():
    first, second = next(train(seed=0)), next(train(seed=1))
    assert (first["label"] != second["label"]).any()
    assert (first["image"] != second["image"]).all()


def test_every_epoch_has_all_examples_in_new_order_with_new_draws():
    batches = take(train(), SIZE)
    labels = np.concatenate([batch["label"] for batch in batches]).reshape(8, SIZE)
    assert (np.sort(labels, 1) == np.arange(SIZE)).all()
    assert len({tuple(epoch) for epoch in labels}) == 8
    images = np.concatenate([batch["image"] for batch in batches])
    assert len({image.tobytes() for image in images}) == 8 * SIZE


@pytest.mark.parametrize("options", THREADS)
@pytest.mark.parametrize("drawn", [0, 1, 9])
def test_resumes_from_its_state(options, drawn):
    running, resumed = train(**options), train(**options)
    take(running, drawn)
    state = running.get_state()
    assert state == {"next_index": drawn}
    expected = take(running, 6)
    take(resumed, 3)
    resumed.set_state(state)
    assert_same(take(resumed, 6), expected)


def test_resumes_from_an_orbax_checkpoint(tmp_path):
    import grain
    import orbax.checkpoint as ocp

    running = train()
    take(running, 5)
    weights = {"w": np.arange(3.0)}
    with ocp.CheckpointManager(tmp_path) as manager:
        data = grain.checkpoint.CheckpointSave(running)
        args = ocp.args.Composite(state=ocp.args.StandardSave(weights), data=data)
        manager.save(5, args=args)
    expected = take(running, 6)

    resumed = train()
    with ocp.CheckpointManager(tmp_path) as manager:
        data = grain.checkpoint.CheckpointRestore(resumed)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(weights), data=data)
        restored = manager.restore(5, args=args)
    assert_same(take(resumed, 6), expected)
    np.testing.assert_array_equal(restored["state"]["w"], weights["w"])


@pytest.mark.parametrize("count", [2, 4, 8])
def test_processes_share_the_batches_of_one_across_epochs(count):
    shards = [take(train(shard=shard, count=count), 12) for shard in range(count)]
    assert shards[0][0]["label"].shape == (8 // count,)
    assert_same(join(shards), take(train(), 12))


@pytest.mark.parametrize("batch", [4, 6, 37])
def test_the_stream_of_rows_does_not_depend_on_the_batch(batch):
    rows = np.concatenate([b["id"] for b in take(train(batch=batch), 12)])
    singles = np.concatenate([b["id"] for b in take(train(batch=1), len(rows))])
    np.testing.assert_array_equal(rows, singles)


def test_processes_are_disjoint_within_an_epoch():
    source = Numbers(40)
    seen = [
        np.concatenate([
            batch['label']
            for batch in take(train_batches(source, draw, batch=8, seed=0, shard=s, count=2), 5)
        ])
        for s in range(2)
    ]  # fmt: skip
    assert not set(seen[0]) & set(seen[1])
    assert sorted(np.concatenate(seen)) == list(range(40))


@pytest.mark.parametrize("before, after", [(1, 2), (2, 1), (2, 4), (8, 2)])
def test_a_state_fits_another_number_of_processes(before, after):
    running = [train(shard=shard, count=before) for shard in range(before)]
    for shard in running:
        take(shard, 7)
    states = [shard.get_state() for shard in running]
    assert states == [{"next_index": 7}] * before
    resumed = [train(shard=shard, count=after) for shard in range(after)]
    for shard in resumed:
        shard.set_state(states[0])
    first, second = (join([take(shard, 6) for shard in shards]) for shards in (resumed, running))
    assert_same(first, second)


@pytest.mark.parametrize("size, count", [(37, 1), (37, 2), (40, 2), (33, 4), (3, 4), (1, 1)])
def test_evaluation_has_every_example_once(size, count):
    shards = [list(evaluate(size, shard=shard, count=count)) for shard in range(count)]
    batches = join(shards)
    assert len(batches) == -(-size // 8)
    assert {batch["label"].shape for batch in batches} == {(8,)}
    assert {batch["valid"].dtype for batch in batches} == {np.dtype(bool)}
    labels, valid = (np.concatenate([b[name] for b in batches]) for name in ("label", "valid"))
    assert list(labels[valid]) == list(range(size))
    assert not valid[size:].any() and (labels[size:] == size - 1).all()
    assert_same(batches, list(evaluate(size)))


def test_evaluation_draws_depend_on_seed_and_index_alone():
    def images(**options):
        batches = list(evaluate(**options))
        return np.concatenate([batch["image"][batch["valid"]] for batch in batches])

    np.testing.assert_array_equal(images(batch=8), images(batch=5))
    np.testing.assert_array_equal(images(batch=8)[:12], images(batch=100, size=12))
    assert (images(seed=1) != images(seed=2)).all()


def test_evaluation_can_be_run_again():
    batches = evaluate()
    assert_same(list(batches), list(batches))


def test_transform_errors_reach_the_caller():
    def broken(example, rng):
        raise RuntimeError("broken transform")

    with pytest.raises(RuntimeError, match="broken transform"):
        next(train_batches(Numbers(), broken, batch=8, seed=0))


@pytest.mark.parametrize("make", [train, evaluate])
@pytest.mark.parametrize(
    "options, named",
    [
        ({"batch": 0}, "batch"),
        ({"batch": 8, "count": 3}, "batch"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**32}, "seed"),
        ({"count": 0}, "count"),
        ({"shard": 2, "count": 2}, "shard"),
        ({"num_threads": -1}, "num_threads"),
        ({"num_threads": 4, "prefetch": 2}, "prefetch"),
    ],
)
def test_errors_name_the_argument_in_one_sentence(make, options, named):
    with pytest.raises(ValueError, match=f"^{named} must be [^\n]*: change {named}\\.$"):
        make(**options)


def test_sources_must_fill_a_batch(unchecked):
    with pytest.raises(ValueError, match=r"^batch must be at most the 37 examples, got 38: "):
        train(batch=38)
    with pytest.raises(ValueError, match=r"^source must be at least one example long, got 0: "):
        evaluate(size=0)
    with pytest.raises(TypeError, match=r"^source must have len and "):
        train_batches(iter([]), draw, batch=8, seed=0)  # type: ignore[arg-type]
