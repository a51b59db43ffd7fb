"""Classes of a plan: one label value or the union of several, each with one canonical form."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from semisam_core.errors import ConfigError
from semisam_core.plan import load_plan, plan_from_json
from semisam_core.plan_sections.task import TargetClass
from tests.conftest import TINY_PLAN, tiny_plan

VALUES = st.lists(st.integers(1, 255), min_size=2, max_size=8, unique=True)


def _classes(*classes: str) -> str:
    return f"task.classes=[{', '.join(classes)}]"


@settings(deadline=None, max_examples=25)
@given(values=VALUES, data=st.data())
def test_the_order_of_values_does_not_change_the_hash(values: list[int], data: st.DataObject) -> None:
    turned = data.draw(st.permutations(values))
    first, second = (tiny_plan(_classes(f"{{name: whole, values: {each}}}")) for each in (values, turned))
    assert first == second
    assert first.hash == second.hash
    assert first.task.classes[0].label_values == tuple(sorted(values))


@settings(deadline=None, max_examples=25)
@given(values=VALUES)
def test_a_class_of_any_values_survives_the_wire(values: list[int]) -> None:
    plan = tiny_plan(_classes(f"{{name: whole, values: {values}}}"))
    arrived = plan_from_json(plan.canonical_json())
    assert arrived == plan
    assert arrived.hash == plan.hash


def test_a_class_with_one_value_is_written_without_unused_keys() -> None:
    assert '"classes":[{"name":"blob","value":1}]' in tiny_plan().canonical_json()


def test_a_union_and_its_parts_have_different_hashes() -> None:
    hashes = {
        tiny_plan(_classes(*classes)).hash
        for classes in (
            ["{name: a, values: [1, 2]}"],
            ["{name: a, values: [1, 4]}"],
            ["{name: a, value: 1}"],
            ["{name: a, value: 1}", "{name: b, value: 2}"],
        )
    }
    assert len(hashes) == 4


@pytest.mark.parametrize("marks", ["value: 1", "values: [1, 2]"])
def test_only_connected_classes_change_the_hash(marks: str) -> None:
    unsaid, apart, connected = (
        tiny_plan(_classes(f"{{name: whole, {marks}{said}}}"))
        for said in ("", ", connected: false", ", connected: true")
    )
    assert unsaid.hash == apart.hash != connected.hash
    arrived = [plan_from_json(each.canonical_json()).task.classes[0].connected for each in (unsaid, apart, connected)]
    assert arrived == [False, False, True]


@pytest.mark.parametrize(
    ("classes", "says"),
    [
        (["{name: a}"], r"task\.classes\.0: give either value, or values"),
        (["{name: a, value: 1, values: [1, 2]}"], r"task\.classes\.0: give either value, or values"),
        (["{name: a, value: null, values: null}"], r"task\.classes\.0: give either value, or values"),
        (["{name: a, values: []}"], r"task\.classes\.0\.values = \[\]: two or more values are expected"),
        (["{name: a, values: [3]}"], r"task\.classes\.0\.values = \[3\]: .*for a single one, write value:"),
        (["{name: a, values: [1, 2, 1]}"], r"task\.classes\.0\.values = .*a value is listed twice"),
        (["{name: a, values: [0, 1]}"], r"task\.classes\.0\.values\.0 = 0: .*greater than or equal to 1"),
        (["{name: a, values: [1, 256]}"], r"task\.classes\.0\.values\.1 = 256: .*less than or equal to 255"),
        (["{name: a, values: [1, 2.5]}"], r"task\.classes\.0\.values\.1 = 2\.5: .*integer"),
        (["{name: a, values: 4}"], r"task\.classes\.0\.values = 4: .*array"),
        (["{name: a, value: 1, connected: 2}"], r"task\.classes\.0\.connected = 2: .*boolean"),
        (["{name: a, value: 1, connected: null}"], r"task\.classes\.0\.connected = None: .*boolean"),
        (["{name: a, value: 2}", "{name: b, values: [1, 2]}"], r"every class value must differ.*\[2, 1, 2\]"),
        (["{name: a, values: [1, 2]}", "{name: b, values: [2, 4]}"], r"every class value must differ"),
    ],
)
def test_ambiguous_label_values_are_refused_with_the_reason(tmp_path: Path, classes: list[str], says: str) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(TINY_PLAN), encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"plan\.yaml: (?s:.)*{says}"):
        load_plan(path, [_classes(*classes)])


def test_a_class_can_be_built_in_python() -> None:
    assert TargetClass(name="tumour", values=(4, 1, 2)).label_values == (1, 2, 4)
    assert TargetClass(name="liver", value=6).label_values == (6,)
