"""The one denoising loop: its arithmetic, what it leaves in the cache, and where gradients go."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from diagonal.diffusion import rollout as rollouts
from diagonal.diffusion.flow import blend, to_clean
from diagonal.diffusion.noise import chunk_noise
from diagonal.diffusion.rollout import chunk_noise_of, denoise_chunk, draw_exit_steps, rollout
from diagonal.errors import FieldError
from diagonal.model.cache import KVPool, new_cache, new_pool
from diagonal.model.dit import CausalWan
from diagonal.schedule import StepSchedule
from tests.diffusion.chunks import CONFIG, SHAPE, kv_of, noise_of, run, text_of
from tests.networks import begun, caches_for, draw, small_causal, small_config


class Recorder:
    """A network whose velocity is a plain function; keeps what it was called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor, bool, bool]] = []

    def __call__(self, latents: Tensor, level: Tensor, text: Any, *, cache: Any = None, write: bool = False) -> Tensor:
        self.calls.append((latents, level, write, torch.is_grad_enabled()))
        return self.velocity(latents, float(level[0, 0]))

    @staticmethod
    def velocity(latents: Tensor, level: float) -> Tensor:
        return 0.5 * latents - level


def keep_pools(monkeypatch: pytest.MonkeyPatch) -> list[KVPool]:
    """The pools that rollouts make from now on."""
    pools: list[KVPool] = []
    make = rollouts.new_pool

    def noted(*arguments: Any) -> KVPool:
        pools.append(make(*arguments))
        return pools[-1]

    monkeypatch.setattr(rollouts, "new_pool", noted)
    return pools


# The arithmetic of a chunk


@pytest.mark.parametrize("context", [None, 0.0, 0.25])
@pytest.mark.parametrize("chunk", [0, 1, 5])
def test_a_chunk_runs_its_row_predicting_clean_and_renoising_with_fresh_noise(chunk: int, context: Any) -> None:
    schedule, network = StepSchedule("432", context=context), Recorder()
    (cache,) = caches_for(CONFIG, small_causal())
    done = denoise_chunk(network, schedule, chunk, text_of(), begun(chunk, cache), noise_of(9, chunk))
    levels = schedule.levels(chunk)
    latents, clean = torch.zeros(SHAPE), torch.zeros(SHAPE)
    for step, level in enumerate(levels):
        fresh = chunk_noise(9, chunk, step, SHAPE[1:])[None]
        latents = fresh if step == 0 else blend(clean, fresh, level)
        assert torch.equal(network.calls[step][0], latents)
        assert torch.equal(network.calls[step][1], torch.full((1, 3), level))
        clean = to_clean(latents, Recorder.velocity(latents, float(torch.tensor(level))), level)
    assert torch.equal(done.clean, clean)
    writes = [write for _, _, write, _ in network.calls]
    if context is None:
        assert torch.equal(done.written, latents) and done.written_level == levels[-1]
        assert writes == [False] * (len(levels) - 1) + [True]
    else:
        renoised = blend(clean, chunk_noise(9, chunk, len(levels), SHAPE[1:])[None], context)
        assert torch.equal(done.written, renoised) and done.written_level == context
        assert torch.equal(network.calls[-1][0], renoised)
        assert network.calls[-1][1].unique().tolist() == [context]
        assert writes == [False] * len(levels) + [True]
    assert done.forwards == len(network.calls) == schedule.forwards(chunk)
    assert not any(gradient for *_, gradient in network.calls)


@pytest.mark.parametrize("context", [None, 0.1])
@pytest.mark.parametrize("exit_step", [0, 1, 2, 3])
def test_the_exit_step_gives_the_sample_and_alone_runs_with_gradient(exit_step: int, context: Any) -> None:
    plain, exiting = Recorder(), Recorder()
    (cache,) = caches_for(CONFIG, small_causal())
    whole = run(plain, cache, 0, context=context)
    done = run(exiting, cache, 0, context=context, exit_step=exit_step)
    gradients = [gradient for *_, gradient in exiting.calls]
    assert gradients == [step == exit_step for step in range(whole.forwards)]
    latents, level, *_ = plain.calls[exit_step]
    level_number = StepSchedule("4322222").levels(0)[exit_step]
    assert torch.equal(done.clean, to_clean(latents, Recorder.velocity(latents, float(level[0, 0])), level_number))
    assert all(torch.equal(a[0], b[0]) and a[2] == b[2] for a, b in zip(plain.calls, exiting.calls, strict=True))
    assert torch.equal(done.written, whole.written) and done.forwards == whole.forwards


@pytest.mark.parametrize(("chunk", "exit_step"), [(0, 4), (1, 3), (2, 2), (0, -1)])
def test_an_exit_beyond_the_row_is_refused_before_any_forward(chunk: int, exit_step: int) -> None:
    network = Recorder()
    (cache,) = caches_for(CONFIG, small_causal())
    with pytest.raises(FieldError, match=f"exit_step = {exit_step}: allowed is a step of chunk {chunk}: 0 to"):
        run(network, cache, chunk, exit_step=exit_step)
    assert network.calls == []


# What a chunk leaves in the cache


def test_a_chunks_steps_leave_the_length_alone_and_the_kv_of_the_last_forward() -> None:
    network = small_causal()
    (cache,) = caches_for(CONFIG, network)
    run(network, cache, 0)
    context = kv_of(cache)
    done = run(network, cache, 1)
    assert cache.chunks == (0, 1)
    assert torch.equal(kv_of(cache)[:, :, :1], context), "the chunk before is as it was"
    found = kv_of(cache)
    with torch.no_grad():
        level = torch.full((1, 3), done.written_level)
        network(done.written, level, text_of(), cache=begun(1, cache), write=True)
    assert torch.equal(kv_of(cache), found), "one forward on the last step's input writes the same bits"
    assert found[:, :, 1].abs().sum() > 0


def test_a_chunk_run_twice_leaves_the_same_cache() -> None:
    network = small_causal()
    (cache,) = caches_for(CONFIG, network)
    run(network, cache, 0)
    run(network, cache, 1, seed=5)
    once = kv_of(cache)
    run(network, cache, 1, seed=6)
    assert cache.chunks == (0, 1) and not torch.equal(kv_of(cache), once)
    run(network, cache, 1, seed=5)
    assert torch.equal(kv_of(cache), once)


def test_a_context_pass_at_the_last_steps_level_is_the_reuse_bit_for_bit() -> None:
    network = small_causal()
    (reuse,), (level,) = caches_for(CONFIG, network), caches_for(CONFIG, network)
    for chunk in range(3):
        done = run(network, reuse, chunk)
        last = torch.full((1, 3), StepSchedule("4322222").levels(chunk)[-1])
        with torch.no_grad():
            network(done.written, last, text_of(), cache=begun(chunk, level), write=True)
    assert torch.equal(kv_of(level), kv_of(reuse))


def test_a_clean_context_holds_the_kv_of_the_finished_chunk() -> None:
    network = small_causal()
    (cache,) = caches_for(CONFIG, network)
    done = run(network, cache, 0, steps="self-forcing")
    assert torch.equal(done.written, done.clean) and done.written_level == 0.0
    found = kv_of(cache)
    with torch.no_grad():
        network(done.clean, torch.zeros(1, 3), text_of(), cache=begun(0, cache), write=True)
    assert torch.equal(kv_of(cache), found)


def test_the_pool_has_the_networks_shape_and_the_compute_type() -> None:
    network = small_causal(layers=3)
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        config = small_config(f"model.compute_dtype={name}")
        pool = new_pool(config, network, 5)
        assert pool.keys.shape == pool.values.shape == (3, 5, 18, 2, 16) and pool.keys.dtype == dtype
        cache = new_cache(config, pool)
        assert (cache.window_chunks, cache.sink_chunks) == (4, 1)


# Rollouts


@pytest.mark.parametrize(("steps", "forwards"), [("4322222", 17), ("self-forcing", 35), ("5432222", 20)])
def test_a_clip_costs_exactly_the_schedules_forwards(steps: str, forwards: int) -> None:
    network, calls = small_causal(layers=1), []
    network.register_forward_hook(lambda *_: calls.append(1))
    done = rollout(network, CONFIG, text_of(), [3], schedule=StepSchedule(steps))
    assert done.forwards == len(calls) == forwards
    assert done.clean.shape == CONFIG.geometry.clip_shape() and not done.clean.requires_grad
    exits = [draw_exit_steps(StepSchedule(steps), range(7), 0)]
    calls.clear()
    assert rollout(network, CONFIG, text_of(), [3], schedule=StepSchedule(steps), exit_steps=exits).forwards == len(
        calls
    )
    assert len(calls) == forwards


def test_a_clip_run_again_elsewhere_is_bit_equal() -> None:
    first = rollout(small_causal(), CONFIG, text_of(), [11], chunks=6).clean
    with torch.random.fork_rng():
        torch.manual_seed(99)
        assert torch.equal(rollout(small_causal(), CONFIG, text_of(), [11], chunks=6).clean, first)
    assert not torch.equal(rollout(small_causal(), CONFIG, text_of(), [12], chunks=6).clean, first)


def test_a_clip_hardly_depends_on_the_clips_beside_it() -> None:
    """Within 2e-5 of latents of size one, in float32: a larger batch is summed in another order."""
    together = rollout(small_causal(), CONFIG, text_of(3), [11, 12, 13], chunks=6).clean
    for row, seed in enumerate((11, 12, 13)):
        alone = rollout(small_causal(), CONFIG, text_of(3)[row : row + 1], [seed], chunks=6).clean
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=2e-5)


def test_a_chunk_takes_in_the_chunks_before_it() -> None:
    texts = text_of(2)
    clips = [rollout(small_causal(), CONFIG, texts[row : row + 1], [3], chunks=3).clean for row in range(2)]
    (cache,) = caches_for(CONFIG, small_causal())
    run(small_causal(), cache, 0, seed=3, text=texts[:1])
    mixed = run(small_causal(), cache, 1, seed=3, text=texts[1:]).clean
    assert not torch.equal(mixed, clips[1][:, :, 3:6]), "only the chunk before differs"


@pytest.mark.parametrize("training", [True, False])
def test_training_keeps_every_page_of_a_rollout_and_inference_only_the_window(
    training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    take = KVPool.take

    def noted(pool: KVPool) -> int:
        taken.append(take(pool))
        return taken[-1]

    monkeypatch.setattr(KVPool, "take", noted)
    pools = keep_pools(monkeypatch)
    rollout(small_causal(layers=1), CONFIG, text_of(2), [1, 2], exit_steps=[[0] * 7] * 2 if training else None)
    assert sorted(taken) == list(range(pools[0].pages)) == list(range(2 * (7 if training else 4)))


def test_a_rollout_with_another_number_of_exits_is_refused() -> None:
    wrong: list[list[list[int]]] = [[[0] * 8], [[0], [0]], [[]]]
    for exits in wrong:
        with pytest.raises(
            FieldError, match=r"allowed is for each of 1 samples an exit step for each of the last chunks"
        ):
            rollout(small_causal(), CONFIG, text_of(), [1], exit_steps=exits)


# Gradients


def gradients(network: CausalWan, output: Tensor) -> dict[str, Tensor]:
    """Of a fixed weighing of `output`, by parameter."""
    loss = (output * draw(*output.shape, seed=77, dtype=output.dtype)).sum()
    found = torch.autograd.grad(loss, list(network.parameters()), retain_graph=True, allow_unused=True)
    names = [name for name, _ in network.named_parameters()]
    return {name: torch.zeros(()) if g is None else g for name, g in zip(names, found, strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize("exits", [(3, 2, 1, 1, 1, 1), (0, 2, 0, 1, 1, 0), (1, 0, 1, 0, 0, 1)])
@pytest.mark.parametrize("context", [None, 0.0])
def test_a_chunk_depends_on_the_parameters_through_its_own_exit_step_alone(
    exits: tuple[int, ...], context: Any, float64_stays: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient is that of a run whose other forwards, and all that they cached, had none."""
    monkeypatch.setattr("diagonal.model.cache.cache_dtype", lambda config: torch.float64)
    network, schedule = small_causal(dtype=torch.float64), StepSchedule("4322222", context=context)
    whole = rollout(
        network, CONFIG, text_of().double(), [4], schedule=schedule, chunks=len(exits), exit_steps=[exits]
    ).clean
    (cache,) = caches_for(CONFIG, network)
    for chunk, exit_step in enumerate(exits):
        done = run(network, cache, chunk, context=context, seed=4, exit_step=exit_step, text=text_of().double())
        assert done.clean.requires_grad and not done.written.requires_grad, "what a session keeps holds no graph"
        written = kv_of(cache).detach()
        cache.pool.keys, cache.pool.values = (x.detach().clone() for x in (cache.pool.keys, cache.pool.values))
        run(network, cache, chunk, context=context, seed=4, text=text_of().double())  # what the next chunks see
        torch.testing.assert_close(kv_of(cache), written, rtol=0, atol=1e-12)
        part = whole[:, :, 3 * chunk : 3 * chunk + 3]
        torch.testing.assert_close(done.clean, part, rtol=0, atol=1e-12)
        mine, alone = gradients(network, part), gradients(network, done.clean)
        for name, gradient in mine.items():
            torch.testing.assert_close(gradient, alone[name], rtol=1e-9, atol=1e-9, msg=f"{name} of chunk {chunk}")
        assert max(float(gradient.abs().max()) for gradient in mine.values()) > 1e-3


def test_the_exit_steps_gradient_is_that_of_one_forward(float64_stays: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Worked by hand: the input of the exit step, and the context, are constants."""
    monkeypatch.setattr("diagonal.model.cache.cache_dtype", lambda config: torch.float64)
    network, schedule = small_causal(dtype=torch.float64), StepSchedule("32")
    whole = rollout(network, CONFIG, text_of().double(), [4], schedule=schedule, chunks=2, exit_steps=[[2, 1]]).clean
    (cache,) = caches_for(CONFIG, network)
    run(network, cache, 0, steps="32", seed=4, text=text_of().double())
    batch, noise = begun(1, cache), noise_of(4, 1)
    first, last = schedule.levels(1)
    with torch.no_grad():
        start = network(noise(0), torch.full((1, 3), first), text_of().double(), cache=batch)
        latents = blend(to_clean(noise(0), start, first), noise(1), last)
    by_hand = to_clean(latents, network(latents, torch.full((1, 3), last), text_of().double(), cache=batch), last)
    mine, expected = gradients(network, whole[:, :, 3:]), gradients(network, by_hand)
    for name, gradient in mine.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-9, msg=name)


def test_the_cache_of_a_training_rollout_never_takes_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    pools = keep_pools(monkeypatch)
    rollout(small_causal(), CONFIG, text_of(), [1], chunks=3, exit_steps=[[3, 2, 1]])
    assert not pools[0].keys.requires_grad and not pools[0].values.requires_grad and pools[0].keys.abs().sum() > 0


def test_without_exits_and_under_no_grad_nothing_takes_gradients() -> None:
    assert not rollout(small_causal(), CONFIG, text_of(), [1], chunks=2).clean.requires_grad
    with torch.no_grad():
        assert not rollout(small_causal(), CONFIG, text_of(), [1], chunks=2, exit_steps=[[0, 0]]).clean.requires_grad
    assert rollout(small_causal(), CONFIG, text_of(), [1], chunks=2, exit_steps=[[0, 0]]).clean.requires_grad


def test_exits_depend_on_their_key_alone_and_every_step_of_a_row_comes_up() -> None:
    schedule = StepSchedule("4322222")
    with torch.random.fork_rng():
        torch.manual_seed(5)
        assert draw_exit_steps(schedule, range(7), 1, "generator", 10) == draw_exit_steps(
            schedule, range(7), 1, "generator", 10
        )
    drawn = [draw_exit_steps(schedule, range(7), 1, "generator", update) for update in range(600)]
    for chunk in range(7):
        steps = len(schedule.levels(chunk))
        counts = [sum(exits[chunk] == step for exits in drawn) for step in range(steps)]
        assert sum(counts) == 600 and min(counts) > 600 / steps * 0.75
    assert drawn[:9] != [draw_exit_steps(schedule, range(7), 2, "generator", update) for update in range(9)]
    assert len({tuple(exits[2:]) for exits in drawn}) == 2**5, "chunks are drawn one by one"
    assert (
        draw_exit_steps(schedule, range(3), 1, "generator", 10)
        == draw_exit_steps(schedule, range(7), 1, "generator", 10)[:3]
    )


def test_noise_of_a_batch_is_each_samples_own() -> None:
    noise = chunk_noise_of(CONFIG.geometry, [5, 6], [0, 3], "cpu")
    for step in (0, 2):
        expected = torch.stack([chunk_noise(5, 0, step, SHAPE[1:]), chunk_noise(6, 3, step, SHAPE[1:])])
        assert torch.equal(noise(step), expected)


# Exits of several samples, and rollouts that are longer than what is scored


def test_samples_of_one_batch_exit_each_at_its_own_step_as_they_would_alone() -> None:
    exits, seeds, texts = [[3, 0, 1], [1, 2, 1], [3, 1, 0]], [5, 6, 7], text_of(3)
    network, schedule = small_causal(), StepSchedule("432")
    together = rollout(network, CONFIG, texts, seeds, schedule=schedule, chunks=3, exit_steps=exits).clean
    for row in range(3):
        alone = rollout(
            network, CONFIG, texts[row : row + 1], seeds[row : row + 1], chunks=3, exit_steps=exits[row : row + 1]
        ).clean
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=2e-5)
        mine, expected = gradients(network, together[row : row + 1]), gradients(network, alone)
        for name, gradient in mine.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=2e-4, msg=name)


def test_chunks_before_those_that_exit_take_no_gradient_and_are_what_serving_makes() -> None:
    network, schedule = small_causal(), StepSchedule("432")
    options: Any = {"schedule": schedule, "chunks": 5}
    served = rollout(network, CONFIG, text_of(), [4], **options).clean
    last = [[len(schedule.levels(chunk)) - 1 for chunk in (3, 4)]]
    trained = rollout(network, CONFIG, text_of(), [4], **options, exit_steps=last).clean
    torch.testing.assert_close(trained, served, rtol=0, atol=2e-5)
    for part, moves in ((trained[:, :, :9], False), (trained[:, :, 9:], True)):
        assert any(gradient.abs().max() > 1e-3 for gradient in gradients(network, part).values()) == moves


def test_a_clean_sink_is_cached_clean_and_later_chunks_are_not() -> None:
    network, schedule = Recorder(), StepSchedule("432", sink_context=0.0)
    (cache,) = caches_for(CONFIG, small_causal())
    for chunk, expected in ((0, 0.0), (1, schedule.levels(1)[-1])):
        done = denoise_chunk(network, schedule, chunk, text_of(), begun(chunk, cache), noise_of(9, chunk))
        writes = [(float(level[0, 0]), latents) for latents, level, write, _ in network.calls if write]
        assert done.written_level == pytest.approx(writes[-1][0]) == pytest.approx(expected)
        assert torch.equal(writes[-1][1], done.written)
        assert torch.equal(done.written, done.clean) == (chunk == 0)


def test_a_clean_newest_frame_is_written_by_itself_over_its_chunks_first_frames() -> None:
    """As a forward by hand over the frames before it, whose K/V stay those of the last step."""
    network = small_causal(layers=3)
    plain, clean = caches_for(CONFIG, network, 2)
    for chunk in (0, 1):
        before, after = (run(network, c, chunk, clean_newest=c is clean) for c in (plain, clean))
        assert (after.forwards, before.forwards) == (before.forwards + 1, before.forwards)
        assert after.refreshed and torch.equal(after.written[:, :, 3:], after.clean[:, :, -1:])
        frame = CONFIG.geometry.frame_tokens
        kept, found = kv_of(plain)[:, :, chunk], kv_of(clean)[:, :, chunk]
        if chunk == 0:
            assert torch.equal(found[:, :, : 2 * frame], kept[:, :, : 2 * frame])
            assert (found[:, :, 2 * frame :] - kept[:, :, 2 * frame :]).abs().amax((0, 2, 3, 4)).min() > 1e-3
    page, frames = clean.pages[-1], slice(2 * CONFIG.geometry.frame_tokens, None)
    written = clean.pool.keys[0, page, frames].clone()
    keys: list[Tensor] = []
    handle = network.blocks[0].attn1.norm_k.register_forward_hook(lambda *found: keys.append(found[2]))
    network(after.clean[:, :, -1:], torch.zeros(1, 1), text_of())
    handle.remove()
    torch.testing.assert_close(written.flatten(1), keys[0][0], rtol=0, atol=1e-5)


def test_a_chunk_that_is_cached_clean_as_a_whole_needs_no_clean_newest_frame() -> None:
    schedule = StepSchedule("432", sink_context=0.0, clean_newest=True)
    assert [schedule.refreshes_newest(chunk) for chunk in range(3)] == [False, True, True]
    assert not StepSchedule("self-forcing", clean_newest=True).refreshes_newest(4)
