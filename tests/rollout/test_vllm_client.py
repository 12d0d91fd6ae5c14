"""The vLLM engine against small servers: routing, deadlines, retries, deaths. A real vLLM is in tests/engines."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any

import pytest

from tests.rollout.small_server import Raw, SmallServer, Status, answer_bytes, completion
from tulu_hpc.rollout import vllm_wire as wire
from tulu_hpc.rollout.engine import Completion, EngineError, Request, Sampling, ServersLostError, VersionSpan
from tulu_hpc.rollout.http import Address
from tulu_hpc.rollout.vllm import VllmEngine

SAMPLING = Sampling(max_new_tokens=4)


def requests(count: int, **options: Any) -> list[Request]:
    return [Request([number, 3], SAMPLING, seed=number, id=f"r{number}", **options) for number in range(count)]


def right(found: Sequence[Completion], asked: Sequence[Request]) -> bool:
    return [each.token_ids for each in found] == [
        [(request.token_ids[0] + request.seed + place) % 50 for place in range(4)] for request in asked
    ] and [each.id for each in found] == [request.id for request in asked]


def run(servers: Sequence[SmallServer], asked: Sequence[Request], **options: Any) -> tuple[VllmEngine, Any]:
    """The engine and its completions, or the error."""

    async def generate() -> tuple[VllmEngine, Any]:
        async with AsyncExitStack() as stack:
            for server in servers:
                await stack.enter_async_context(server)
            values = {"vocab_size": 50, "deadline_seconds": 5.0, "probe_seconds": 0.1} | options
            engine = VllmEngine([server.address for server in servers], **values)
            try:
                return engine, await engine.generate(asked)
            except (EngineError, ValueError) as error:
                return engine, error

    return asyncio.run(generate())


def test_many_requests_at_many_servers() -> None:
    """Every request once, in order, no server with more than its share at a time."""

    async def slow(server: SmallServer, path: str, body: Any) -> Any:
        await asyncio.sleep(0.001 * (body["token_ids"][0] % 3))
        return completion(body)

    servers, asked = [SmallServer(slow) for _ in range(3)], requests(45)
    engine, found = run(servers, asked, max_in_flight=5)
    assert right(found, asked) and engine.retries == 0
    assert all(1 < server.most_open <= 5 for server in servers)
    assert sum(path.startswith("/inference") for server in servers for path, _ in server.requests) == 45
    assert found[0].version_spans == (VersionSpan(7, 0, 4),) and found[0].policy_version == 7
    assert engine.stats.sequences == 45 and engine.stats.new_tokens == 180


def test_the_slow_server_gets_less() -> None:
    async def slow(server: SmallServer, path: str, body: Any) -> Any:
        await asyncio.sleep(0.2)
        return completion(body)

    servers, asked = [SmallServer(slow), SmallServer()], requests(40)
    _, found = run(servers, asked, max_in_flight=2)
    assert right(found, asked)
    assert len(servers[0].requests) < len(servers[1].requests) / 2


def _once(failure: Any) -> Any:
    """A handler that fails at the first attempt of every request."""
    seen: set[int] = set()

    async def handler(server: SmallServer, path: str, body: Any) -> Any:
        seed = body["sampling_params"]["seed"]
        if seed not in seen:
            seen.add(seed)
            return failure(body) if callable(failure) else failure
        return completion(body)

    return handler


@pytest.mark.parametrize(
    "failure",
    [
        Status(500, {"error": "EngineCore"}),
        Raw(b""),
        lambda body: Raw(answer_bytes(completion(body))[:-5]),
        lambda body: completion(body, finish_reason=None),
        lambda body: completion(body, finish_reason="abort"),
        lambda body: completion(body, token_ids=[1, 2]),
        lambda body: completion(body, token_ids=[1, 2, 3, 50]),
        lambda body: completion(body, logprobs=None),
        lambda body: completion(body, logprobs={"content": [{"token_id": 0, "logprob": float("nan")}] * 4}),
        lambda body: completion(body, weight_versions=[{"version": "7", "start": 1, "end": 4}]),
        lambda body: completion(body, weight_versions=[{"version": "7", "start": 0, "end": 3}]),
        lambda body: {"choices": []},
        [],
    ],
)
def test_a_bad_answer_is_asked_for_again(failure: Any) -> None:
    """And yields one completion, not two."""
    server, asked = SmallServer(_once(failure)), requests(6)
    engine, found = run([server], asked)
    assert right(found, asked) and engine.retries == 6
    assert sum(path.startswith("/inference") for path, _ in server.requests) == 12


def test_attempts_end() -> None:
    async def bad(server: SmallServer, path: str, body: Any) -> Any:
        return completion(body, finish_reason=None) if body["token_ids"][0] == 2 else completion(body)

    server = SmallServer(bad)
    _, error = run([server], requests(4), attempts=2)
    assert isinstance(error, EngineError) and not isinstance(error, ServersLostError)
    assert "'r2' failed 2 times" in str(error) and "finish_reason None" in str(error)


def test_a_refused_request_is_not_repeated() -> None:
    async def refuse(server: SmallServer, path: str, body: Any) -> Any:
        return Status(400, {"error": "too long"})

    server = SmallServer(refuse)
    _, error = run([server], requests(1))
    assert isinstance(error, ValueError) and "'r0' was refused" in str(error) and "too long" in str(error)
    assert len(server.requests) == 1


def test_late_answers_are_hung_up_on() -> None:
    """The second attempt starts when the first is closed: the server never works on both."""
    seen: set[int] = set()

    async def late(server: SmallServer, path: str, body: Any) -> Any:
        if body["token_ids"][0] not in seen:
            seen.add(body["token_ids"][0])
            await asyncio.Event().wait()
        return completion(body)

    server, asked = SmallServer(late), requests(3)
    engine, found = run([server], asked, deadline_seconds=0.2, max_in_flight=1, probe_seconds=5.0)
    assert right(found, asked) and engine.retries == 3
    assert server.hung_up == 3 and server.most_open == 1


def test_an_answer_to_another_attempt_is_dropped() -> None:
    """A proxy that repeats an old answer: it is counted, and nobody gets it."""
    first: dict[int, Any] = {}
    repeated: set[int] = set()

    async def repeat(server: SmallServer, path: str, body: Any) -> Any:
        number = body["token_ids"][0]
        if number not in first:
            first[number] = completion(body)
            return Status(500)
        if number not in repeated:
            repeated.add(number)
            return first[number]
        return completion(body)

    server, asked = SmallServer(repeat), requests(3)
    engine, found = run([server], asked, max_in_flight=1, attempts=4)
    assert right(found, asked)
    assert engine.late_answers == 3 and engine.retries == 6
    assert sum("instead of 'tulu-r0-" in incident for incident in engine.take_incidents(10)) == 1


@pytest.mark.parametrize(
    "versions", [None, [{"version": "dirty", "start": 0, "end": 4}], [{"version": "default", "start": 0, "end": 4}]]
)
def test_a_server_with_weights_that_nobody_sent(versions: Any) -> None:
    """It was started again by somebody else, or its update broke off: no requests until it has been sent weights."""

    async def fresh(server: SmallServer, path: str, body: Any) -> Any:
        return completion(body, weight_versions=versions)

    servers, asked = [SmallServer(fresh), SmallServer()], requests(12)
    engine, found = run(servers, asked, attempts=1)
    assert right(found, asked)
    assert [address for address, _ in engine.serving()] == [servers[1].address]
    (reason,) = engine.missing()
    assert str(servers[0].address) in reason and "weights" in reason


def test_what_is_told_of_a_failure() -> None:
    """Server, request and attempt, and what happened."""
    _, error = run([SmallServer(_once(Status(500, "engine"))), SmallServer()], requests(1), attempts=1)
    assert "request 'r0' failed 1 times: POST http://127.0.0.1:" in str(error) and "status 500" in str(error)
    server = SmallServer(_once(lambda body: completion(body, finish_reason="abort")))
    engine, _ = run([server], requests(1))
    (incident,) = engine.take_incidents()
    assert incident.startswith("attempt tulu-r0-") and f"-1 failed: {server.address}: finish_reason 'abort'" in incident
    assert engine.take_incidents() == []


def test_scores_are_asked_for_again() -> None:
    """Like samples: a failure is not the end, a dead server's scores come from another."""
    failed: set[int] = set()

    async def score(server: SmallServer, path: str, body: Any) -> Any:
        tokens = body["token_ids"]
        if tokens[0] not in failed:
            failed.add(tokens[0])
            if tokens[0] == 0:
                server.die()
                await asyncio.Event().wait()
            return Status(500)
        entries = [None, *({str(token): {"logprob": -token / 8}} for token in tokens[1:])]
        return {"request_id": body["request_id"], "prompt_logprobs": entries}

    async def ask() -> list[list[float]]:
        async with SmallServer(score) as one, SmallServer(score) as two:
            engine = VllmEngine([one.address, two.address], vocab_size=50, probe_seconds=0.1, max_in_flight=1)
            found = await engine.score([[number, 4, 8] for number in range(4)])
            assert len(engine.serving()) == 1 and engine.retries == 4
            one.die()
            two.die()
            with pytest.raises(ServersLostError):
                await engine.score([[3, 4]])
            return found

    assert asyncio.run(ask()) == [[-0.5, -1.0]] * 4


def test_a_server_that_dies() -> None:
    """Its requests go to the other one; those it had answered are not asked for again."""

    async def die(server: SmallServer, path: str, body: Any) -> Any:
        if len(server.requests) > 5:
            server.die()
            await asyncio.Event().wait()
        return completion(body)

    servers, asked = [SmallServer(die), SmallServer()], requests(40)
    engine, found = run(servers, asked, max_in_flight=4)
    assert right(found, asked)
    assert [address for address, _ in engine.serving()] == [servers[1].address]


def test_a_server_that_hangs() -> None:
    """Its engine answers nothing any more, though connections are accepted: the probe finds out, not the deadline."""
    hanging = asyncio.Event()

    async def hang(server: SmallServer, path: str, body: Any) -> Any:
        await hanging.wait()

    async def serve(server: SmallServer, path: str, body: Any) -> Any:
        return completion(body)

    servers, asked = [SmallServer(hang, is_paused=hang), SmallServer(serve)], requests(12)
    engine, found = run(servers, asked, deadline_seconds=500.0)
    assert right(found, asked)
    assert [address for address, _ in engine.serving()] == [servers[1].address]


def test_all_servers_lost() -> None:
    async def die(server: SmallServer, path: str, body: Any) -> Any:
        if body["token_ids"][0] >= 6:
            server.die()
            await asyncio.Event().wait()
        return completion(body)

    asked = requests(10)
    _, error = run([SmallServer(die)], asked, max_in_flight=1)
    assert isinstance(error, ServersLostError)
    assert sorted(error.completions) == list(range(6)) and right(list(error.completions.values()), asked[:6])


@pytest.mark.parametrize(
    ("mode", "sampling", "words"),
    [
        ("raw_logprobs", Sampling(4, temperature=0.7), "processed_logprobs"),
        ("processed_logprobs", Sampling(4, temperature=0.0), "raw_logprobs"),
        ("processed_logprobs", Sampling(4, temperature=0.7, top_p=0.9), "renormalised"),
    ],
)
def test_log_probs_that_the_servers_do_not_give(mode: Any, sampling: Sampling, words: str) -> None:
    server = SmallServer()
    _, error = run([server], [Request([1], sampling)], logprobs_mode=mode)
    assert isinstance(error, ValueError) and words in str(error) and not server.requests


@pytest.mark.parametrize(("tokens", "words"), [([], "empty"), ([50], "vocabulary"), ([-1], "vocabulary")])
def test_prompts_that_cannot_be(tokens: list[int], words: str) -> None:
    _, error = run([SmallServer()], [Request(tokens, SAMPLING)])
    assert isinstance(error, ValueError) and words in str(error)


def test_what_ended_an_answer() -> None:
    stopping = Request([1], Sampling(4, stop_token_ids=(9,), stop_strings=("x",)))
    body = wire.generate_body(stopping)
    assert body["sampling_params"]["ignore_eos"] and body["sampling_params"]["stop"] == ["x"]

    def parse(**choice: Any) -> Completion:
        tokens = choice.pop("tokens")
        entries = [{"token_id": token, "logprob": -1.0} for token in tokens]
        return wire.parse_generate(
            {"choices": [{"token_ids": tokens, "logprobs": {"content": entries}, **choice}]}, stopping, 50, 0
        )

    assert parse(tokens=[1, 9], finish_reason="stop", stop_reason=9).stop_reason == 9
    assert parse(tokens=[1, 9], finish_reason="stop", stop_reason=None).stop_reason == 9
    assert parse(tokens=[1, 2], finish_reason="stop", stop_reason="x").stop_reason == "x"
    assert parse(tokens=[1, 2, 3, 4], finish_reason="length").stop_reason is None
    for choice, words in (
        ({"tokens": [1, 2], "finish_reason": "stop", "stop_reason": None}, "does not name"),
        ({"tokens": [1, 2], "finish_reason": "length"}, "cut at 2 of 4"),
        ({"tokens": [1, 2, 3, 4, 5], "finish_reason": "length"}, "at most 4"),
    ):
        with pytest.raises(wire.MalformedError, match=words):
            parse(**choice)


def test_seeds_of_64_bits_stay_different() -> None:
    seeds = [wire.generate_body(Request([1], SAMPLING, seed))["sampling_params"]["seed"] for seed in (5, 2**64 - 1)]
    assert seeds == [5, 2**63 - 1]


def test_health() -> None:
    async def ask() -> tuple[dict[str, Any], EngineError]:
        async with SmallServer() as one, SmallServer() as two:
            engine = VllmEngine([one.address, two.address], vocab_size=50, probe_seconds=1.0)
            two.die()
            facts = await engine.health()
            one.die()
            with pytest.raises(EngineError) as caught:
                await engine.health()
            assert facts["serving"] == [str(one.address)] and facts["silent"] == [str(two.address)]
            return facts, caught.value

    _, error = asyncio.run(ask())
    assert "no vLLM server answers" in str(error)


def test_no_update_without_tensors() -> None:
    engine = VllmEngine([Address("127.0.0.1", 1)], vocab_size=50)
    with pytest.raises(ValueError, match="weights of their own"):
        asyncio.run(engine.update_weights(None, 1))
