"""The decision table: each combination of what can be found is matched by one row of it, and is decided as it says."""

from __future__ import annotations

import re
from itertools import product
from typing import NamedTuple

import pytest

from ringpool.coordinator import recovery
from ringpool.coordinator.recovery import Action, Disk, Where, decide
from ringpool.shm.layout import STATUS_STEPS, Status


class Case(NamedTuple):
    """One combination of inputs."""

    where: Where
    alive: bool
    result: Status
    started: bool
    disk: Disk
    may_retry: bool

    def words(self) -> dict[str, str]:
        """What the table calls them."""
        results = {Status.EMPTY: "empty", Status.STAGED: "staged"}
        return {
            "list": self.where.name.lower(),
            "holder": "alive" if self.alive else "dead",
            "result": results.get(self.result, "finished"),
            "started": "yes" if self.started else "no",
            "disk": self.disk.name.lower(),
            "deaths": "may" if self.may_retry else "too many",
        }

    def decision(self) -> Action:
        return decide(
            self.where,
            alive=self.alive,
            result=self.result,
            started=self.started,
            disk=self.disk,
            may_retry=self.may_retry,
        )


class Row(NamedTuple):
    """A row of the documented table: what it asks for in each column, and its action."""

    wanted: dict[str, str]
    action: Action

    def matches(self, case: Case) -> bool:
        words = case.words()
        return all(text in ("-", words[column]) for column, text in self.wanted.items())


def table() -> list[Row]:
    """The rows in the docstring of ``recovery``; the rule below its head says where its columns are."""
    lines = (recovery.__doc__ or "").splitlines()
    rule = next(n for n, line in enumerate(lines) if line.strip().startswith("----"))
    spans = [match.span() for match in re.finditer("-+", lines[rule])]
    columns = [lines[rule - 1][first:last].strip() for first, last in spans]
    rows: list[Row] = []
    for line in lines[rule + 1 :]:
        if not line.strip():
            break
        cells = dict(zip(columns, (line[first:last].strip() for first, last in spans), strict=True))
        rows.append(Row(cells, Action[cells.pop("action").split()[0]]))
    return rows


CASES = [Case(*values) for values in product(Where, (False, True), Status, (False, True), Disk, (False, True))]


def test_the_table_has_the_columns_that_are_decided_on() -> None:
    assert {tuple(row.wanted) for row in table()} == {tuple(CASES[0].words())}


def test_each_cell_is_a_word_that_there_is() -> None:
    for column in CASES[0].words():
        known = {case.words()[column] for case in CASES}
        assert {row.wanted[column] for row in table()} - {"-"} <= known, column


def test_each_case_is_matched_by_exactly_one_row_and_decided_as_it_says() -> None:
    rows = table()
    for case in CASES:
        matching = [row for row in rows if row.matches(case)]
        assert len(matching) == 1, case
        assert case.decision() is matching[0].action, case


def test_each_row_is_the_one_for_some_case() -> None:
    assert all(any(row.matches(case) for case in CASES) for row in table())


def test_each_action_is_taken_somewhere() -> None:
    assert {row.action for row in table()} == set(Action)


@pytest.mark.parametrize("case", [c for c in CASES if c.where is Where.CLAIMED and c.alive], ids=str)
def test_what_the_living_hold_is_left_alone(case: Case) -> None:
    assert case.decision() is Action.LEAVE


def test_a_finished_task_is_never_run_again() -> None:
    again = {case.result for case in CASES if case.decision() in (Action.REQUEUE, Action.RETRY)}
    assert again == {Status.EMPTY}


def test_a_task_whose_output_may_be_in_place_is_never_run_again() -> None:
    for case in CASES:
        if case.result is Status.STAGED:
            assert case.decision() in (Action.LEAVE, Action.COMMIT, Action.DOUBT), case


@pytest.mark.parametrize(
    ("action", "status"), [(Action.COMMIT, Status.OK), (Action.FAIL, Status.DIED), (Action.DOUBT, Status.IN_DOUBT)]
)
def test_what_the_coordinator_posts_for_the_dead_is_a_legal_step(action: Action, status: Status) -> None:
    found = {case.result for case in CASES if case.decision() is action}
    assert found
    for result in found:
        assert status in STATUS_STEPS[result], f"{result.name} -> {status.name}"
