"""The scheduler by itself: no model, no loop, every step by hand or by hypothesis."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tee_side.scheduler import Policy, Portion, Scheduler, Wanted

Batch = list[Portion[Any]]


def scheduler(chunk_tokens: int = 4, most_portions: int = 8, decode_lanes: int = 1) -> Scheduler[Any]:
    return Scheduler(Policy(chunk_tokens, most_portions, decode_lanes))


def shown(batch: Batch) -> list[tuple[Any, list[int]]]:
    return [(portion.request, list(portion.tokens)) for portion in batch]


def test_a_prompt_goes_out_in_chunks_and_only_the_last_wants_a_score() -> None:
    s = scheduler()
    s.add("a", range(10))
    batches = [s.next() for _ in range(3)]
    assert [shown(batch) for batch in batches] == [[("a", [0, 1, 2, 3])], [("a", [4, 5, 6, 7])], [("a", [8, 9])]]
    assert [batch[0].wanted for batch in batches] == [Wanted.NONE, Wanted.NONE, Wanted.LAST]
    assert [batch[0].first for batch in batches] == [0, 4, 8]
    assert not s.next(), "nothing more before its scores have come"


def test_all_scores_are_wanted_of_each_chunk() -> None:
    s = scheduler()
    s.add("a", range(6), every=True)
    assert [s.next()[0].wanted for _ in range(2)] == [Wanted.ALL, Wanted.ALL]


def test_decodes_go_together_and_with_a_chunk() -> None:
    s = scheduler()
    for name in "abc":
        s.add(name, [1])
        s.done(s.next())
    s.token("a", 7)
    s.token("b", 8)
    s.add("d", range(5))
    batch = s.next()
    assert shown(batch) == [("a", [7]), ("b", [8]), ("d", [0, 1, 2, 3])]
    assert [portion.decode for portion in batch] == [True, True, False]
    s.token("c", 9)
    assert shown(s.next()) == [("d", [4])], "one batch with decodes at a time"
    s.done(batch)
    assert shown(s.next()) == [("c", [9])]


def test_short_prompts_share_a_chunk() -> None:
    s = scheduler(chunk_tokens=8)
    for name, tokens in (("a", 3), ("b", 4), ("c", 5), ("d", 2)):
        s.add(name, range(tokens))
    assert shown(s.next()) == [("a", [0, 1, 2]), ("b", [0, 1, 2, 3])]
    assert shown(s.next()) == [("c", [0, 1, 2, 3, 4]), ("d", [0, 1])]


def test_prompts_take_turns() -> None:
    s = scheduler()
    s.add("long", range(12))
    s.add("short", range(4))
    assert [shown(s.next())[0][0] for _ in range(4)] == ["long", "short", "long", "long"]


def test_decodes_are_shared_out_over_the_lanes() -> None:
    s = scheduler(decode_lanes=2)
    for name in range(6):
        s.add(name, [1])
        s.done(s.next())
    for name in range(6):
        s.token(name, 1)
    assert [len(s.next()) for _ in range(3)] == [3, 3, 0]


def test_uneven_shares_become_even_as_batches_come_back() -> None:
    """Five that are ready while one is in flight are six in all: not five of them go out together, and for ever."""
    s = scheduler(decode_lanes=2)
    for name in range(6):
        s.add(name, [1])
        s.done(s.next())
    s.token(0, 1)
    s.token(1, 1)
    alone, other = s.next(), s.next()
    for name in (2, 3, 4, 5):
        s.token(name, 1)
    assert (len(alone), len(other), s.next()) == (1, 1, [])
    s.done(alone)
    s.token(0, 2)
    assert len(s.next()) == 3
    s.done(other)
    s.token(1, 2)
    assert len(s.next()) == 3


def test_who_has_gone_gets_no_turn() -> None:
    s = scheduler()
    s.add("a", range(9))
    s.add("b", [1])
    first = s.next()
    s.remove("a")
    s.remove("a")
    assert shown(s.next()) == [("b", [1])]
    s.token("a", 5)
    s.done(first)
    assert not s.next()
    assert not s.has("a")


requests = st.lists(st.tuples(st.integers(1, 20), st.integers(0, 6)), min_size=1, max_size=8)
policies = st.builds(Policy, st.integers(1, 8), st.integers(1, 4), st.integers(1, 3))


@given(requests, policies, st.randoms(use_true_random=False))
def test_everybody_gets_everything_once_and_in_order(
    wanted: list[tuple[int, int]], policy: Policy, random: Any
) -> None:
    """Any prompts and answers, batches that come back in any order, some requests that leave: nobody starves."""
    s: Scheduler[int] = Scheduler(policy)
    sent: dict[int, list[int]] = {name: [] for name in range(len(wanted))}
    answered: Counter[int] = Counter()
    gone: set[int] = set()
    left: set[int] = set()
    flying: list[Batch] = []
    for name, (prompt, _) in enumerate(wanted):
        s.add(name, range(prompt))

    def land(batch: Batch) -> None:
        s.done(batch)
        for portion in batch:
            if portion.wanted is Wanted.LAST and portion.request not in gone:
                name = portion.request
                if answered[name] == wanted[name][1]:
                    s.remove(name)
                    gone.add(name)
                else:
                    s.token(name, wanted[name][0] + answered[name])
                    answered[name] += 1

    for _ in range(2000):
        batch = s.next() if len(flying) < 3 else []
        if batch:
            assert len(batch) <= policy.most_portions
            chunks = [portion for portion in batch if not portion.decode]
            assert sum(len(portion.tokens) for portion in chunks) <= policy.chunk_tokens
            assert len({portion.request for portion in batch}) == len(batch), "two pieces of one request"
            for portion in batch:
                assert portion.request not in gone
                assert len(portion.tokens) <= (1 if portion.decode else policy.chunk_tokens)
                sent[portion.request] += portion.tokens
            flying.append(batch)
            assert sum(any(p.decode for p in b) for b in flying) <= policy.decode_lanes
        elif flying:
            land(flying.pop(random.randrange(len(flying))))
        else:
            break
        if random.random() < 0.02 and len(gone) < len(wanted) - 1:
            leaver = random.randrange(len(wanted))
            s.remove(leaver)
            left.add(leaver)
            gone.add(leaver)
    assert not flying
    for name in gone - left:
        prompt, answer = wanted[name]
        assert sent[name] == list(range(prompt + answer))
    assert gone == set(range(len(wanted))), "somebody never got a turn"
