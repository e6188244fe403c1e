"""The service's parts by themselves: turns, pieces of answers, keys and allowances."""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import example, given
from hypothesis import strategies as st

from raylm.cli import main
from raylm.errors import SettingsError
from raylm.inference.service import keys as keys_module
from raylm.inference.service import turns as turns_module
from raylm.inference.service.host import ModelHost
from raylm.inference.service.keys import Allowance, KeyFile, add_key, read_keys
from raylm.inference.service.questions import Pieces, Question, Reply, cut_at
from raylm.inference.service.turns import Turns
from raylm.lease import Taken, held
from raylm.settings import ServeSettings
from raylm.storage import StoragePath

# ----------------------------------------------------------------------------------------------- turns


def run_bulk(turns: Turns, batches: int, seconds: float) -> list[tuple[float, float]]:
    """When each batch of a batch job was computed."""
    spans = []
    for _ in range(batches):
        with turns.bulk():
            start = time.monotonic()
            time.sleep(seconds)
            spans.append((start, time.monotonic()))
    return spans


def test_a_batch_job_has_all_the_time_where_nobody_asks() -> None:
    turns = Turns(share=0.01)
    start = time.monotonic()
    run_bulk(turns, 10, 0.01)
    assert time.monotonic() - start < 5, "at a hundredth of the time it would be nine seconds"


def test_a_batch_job_keeps_to_its_share_while_people_ask() -> None:
    turns = Turns(share=0.25)
    with turns.online():
        pass
    spans = run_bulk(turns, 5, 0.05)
    used = sum(end - start for start, end in spans[:-1])
    whole = spans[-1][0] - spans[0][0]
    assert used / whole <= 0.26


def test_a_batch_job_has_the_model_back_once_it_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns_module, "QUIET_S", 0.2)
    turns = Turns(share=0.01)
    with turns.online():
        pass
    start = time.monotonic()
    run_bulk(turns, 3, 0.05)
    assert time.monotonic() - start < 2, "at a hundredth of the time it would be ten seconds"


def test_an_online_request_waits_for_one_batch_at_most() -> None:
    turns = Turns(share=1.0)
    job = [threading.Thread(target=run_bulk, args=(turns, 20, 0.05)) for _ in range(3)]
    for thread in job:
        thread.start()
    waits = []
    for _ in range(8):
        time.sleep(0.03)
        start = time.monotonic()
        with turns.online():
            waits.append(time.monotonic() - start)
    assert any(thread.is_alive() for thread in job)
    for thread in job:
        thread.join()
    assert sorted(waits)[4] < 0.09, "of three waiting chunks only one may be before it"


def test_a_turn_that_fails_is_given_on() -> None:
    turns = Turns(share=0.5)
    for kind in (turns.online, turns.bulk):
        with pytest.raises(ZeroDivisionError), kind():
            _ = 1 / 0
    with turns.online():
        pass


def test_how_long_a_turn_has_lasted() -> None:
    turns = Turns(share=0.5)
    assert turns.held_s == 0
    for kind in (turns.online, turns.bulk):
        with kind():
            time.sleep(0.05)
            assert 0.05 <= turns.held_s < 5
        assert turns.held_s == 0


# ---------------------------------------------------------------------------------------------- pieces


def test_a_text_is_cut_before_the_first_string_to_stop_at() -> None:
    assert cut_at("one. two; three", ("; ", ". ")) == ("one", True)
    assert cut_at("one", ()) == ("one", False)


@example("aaaaaa ab", [1, 2, 5], "ab")
@given(
    st.text("ab \n", max_size=30), st.lists(st.integers(1, 5), max_size=30), st.sampled_from(["", "ab", "bba", "\n"])
)
def test_pieces_make_the_answer(text: str, sizes: list[int], stop: str) -> None:
    stops = (stop,) if stop else ()
    pieces, told, place = Pieces(stops), "", 0
    for size in sizes:
        place += size
        told += pieces.of(text[:place])
        whole = cut_at(text.lstrip(), stops)[0].rstrip()
        assert whole.startswith(told), "what was told is part of the answer"
        if pieces.is_over:
            break
    told += pieces.rest(cut_at(text.strip(), stops)[0].rstrip())
    assert told == cut_at(text.strip(), stops)[0].rstrip()


def test_a_piece_that_may_be_the_beginning_of_a_stop_waits() -> None:
    pieces = Pieces(("###",))
    assert [pieces.of(text) for text in ("a", "a#", "a##", "a##b")] == ["a", "", "", "##b"]
    assert pieces.of("a##b##") == "" and not pieces.is_over
    assert pieces.of("a##b###") == "" and pieces.is_over


# ------------------------------------------------------------------------------------------------ keys


def test_a_key_is_known_by_its_hash_alone(tmp_path: Path) -> None:
    place = StoragePath(str(tmp_path / "keys.yaml"))
    secret = add_key(place, "nightly", 60, None)
    other = add_key(place, "people", None, 9)
    text = place.read_bytes().decode()
    assert secret not in text and hashlib.sha256(secret.encode()).hexdigest() in text
    assert len(secret) > 40 and secret != other
    keys = KeyFile(place.uri)
    found = keys.find(secret)
    assert found and found[0] == "nightly" and found[1].requests_per_minute == 60
    assert [keys.find(wrong) for wrong in ("", secret[:-1], secret + "x")] == [None] * 3
    with pytest.raises(SettingsError, match="key nightly: .*keys.yaml has one already"):
        add_key(place, "nightly", None, None)
    with pytest.raises(SettingsError, match="letters, digits"):
        add_key(place, "no name", None, None)
    adds = "key third: process .* adds one to .*keys.yaml now"
    with held(place.parent / "keys.yaml.lock", ""), pytest.raises(Taken, match=adds):
        add_key(place, "third", None, None)
    assert read_keys(place).keys() == {"nightly", "people"}


def test_every_key_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = StoragePath(str(tmp_path / "keys.yaml"))
    secrets = [add_key(place, f"k{number}", None, None) for number in range(5)]
    compared = []
    monkeypatch.setattr(keys_module.hmac, "compare_digest", lambda a, b: compared.append(a) or a == b)
    keys = KeyFile(place.uri)
    for secret in (secrets[0], secrets[4], "none"):
        compared.clear()
        keys.find(secret)
        assert len(compared) == 5


def test_keys_come_and_go_without_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys_module, "_LOOK_S", 0.0)
    place = StoragePath(str(tmp_path / "keys.yaml"))
    old = add_key(place, "old", None, None)
    keys = KeyFile(place.uri)
    new = add_key(place, "new", None, None)
    assert keys.find(old) and not keys.find(new) and keys.is_due
    keys.refresh()
    assert keys.find(old) and keys.find(new)
    place.write_bytes(b"old: {sha256: 12}")
    keys.refresh()
    assert keys.find(new), "a file that is broken does not lock everybody out"
    place.delete()
    keys.refresh()
    assert keys.find(new), "nor does one that cannot be had"
    place.write_bytes(b"{}")
    keys.refresh()
    assert keys.find(new) is None
    last = add_key(place, "last", None, None)
    keys.refresh()
    assert keys.find(last), "a file in braces is written anew"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: {sha256: 12}", "a.sha256"),
        ("a: {sha26: '" + "0" * 64 + "'}", "a.sha256: Field required"),
        ("[1, 2]", "all of it"),
        ("{", "not readable as YAML"),
        ("a: {sha256: '" + "0" * 64 + "', requests_per_minute: 0}", "a.requests_per_minute"),
    ],
)
def test_a_file_that_holds_something_else_is_named(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "keys.yaml").write_text(text)
    with pytest.raises(SettingsError, match=r"keys.yaml.*") as refused:
        read_keys(StoragePath(str(tmp_path / "keys.yaml")))
    assert reason in str(refused.value)
    with pytest.raises(SettingsError, match="there is no file"):
        read_keys(StoragePath(str(tmp_path / "none.yaml")))


def test_the_command_shows_a_key_once(tmp_path: Path) -> None:
    place = tmp_path / "keys.yaml"
    made = CliRunner().invoke(main, ["serve-key", "web", "--file", str(place), "--texts-per-minute", "7"])
    assert made.exit_code == 0, made.output
    found = KeyFile(str(place)).find(made.output.strip())
    assert found and found[0] == "web" and found[1].texts_per_minute == 7
    refused = CliRunner().invoke(main, ["serve-key", "web"])
    assert refused.exit_code == 1 and "serve.keys" in refused.output


def test_an_allowance_fills_with_time() -> None:
    allowance = Allowance.full(60, now=0.0)
    assert [allowance.take(30, 0.0), allowance.take(30, 0.0)] == [0.0, 0.0]
    assert allowance.take(1, 0.0) == pytest.approx(1.0)
    assert allowance.take(2, 1.0) == pytest.approx(1.0), "one a second comes back"
    assert allowance.take(2, 2.0) == 0.0
    assert allowance.take(500, 62.0) == 0.0, "more than a minute's worth goes when all of it is there"
    assert allowance.take(1, 62.0) == pytest.approx((500 - 60 + 1) * 1.0)


# ---------------------------------------------------------------------------------------------- health


def test_a_replica_whose_engine_hangs_says_so(model_directory: Path) -> None:
    """Ray Serve then replaces it: what hangs in an engine cannot be interrupted."""
    host = ModelHost(ServeSettings(row_limit_s=2), str(model_directory), "cpu")
    asyncio.run(host.check_health())
    with host._turns.bulk():
        asyncio.run(host.check_health())
        time.sleep(2.1)
        with pytest.raises(RuntimeError, match="the engine has been at a batch for"):
            asyncio.run(host.check_health())
    asyncio.run(host.check_health())


def test_a_large_request_lets_others_in_between(model_directory: Path, sentences: list[str]) -> None:
    host = ModelHost(ServeSettings(max_batch_tokens=64), str(model_directory), "cpu")
    rows = tuple((text,) for text in sentences[:300])

    async def asked() -> tuple[Any, Any, bool]:
        large = asyncio.create_task(host.ask([Question("translate", rows)]))
        await asyncio.sleep(0.05)
        [small] = await host.ask([Question("translate", (("open the window",),))])
        was_first = not large.done()
        [reply] = await large
        return reply, small, was_first

    reply, small, was_first = asyncio.run(asked())
    assert was_first
    assert isinstance(small, Reply) and small.outputs[0].text
    assert isinstance(reply, Reply) and len(reply.outputs) == 300
    [alone] = asyncio.run(
        ModelHost(ServeSettings(), str(model_directory), "cpu").ask([Question("translate", rows[250:])])
    )
    assert isinstance(alone, Reply)
    assert [o.truncated for o in reply.outputs[250:]] == [o.truncated for o in alone.outputs]
    assert sum(a.text == b.text for a, b in zip(reply.outputs[250:], alone.outputs, strict=True)) > 40
