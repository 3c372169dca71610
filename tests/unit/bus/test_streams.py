"""The configurations of streams: compared field by field, and found by subject."""

from collections.abc import Mapping
from typing import Any

import pytest

from schemas.subjects import Subjects
from worker.bus import streams

SUBJECTS = Subjects("hostd.v1.test", "h1", "test")


def test_differences_name_the_field_and_both_values() -> None:
    wanted = {"a": 1, "b": "x", "c": True, "d": 0, "e": False}

    assert streams.differences(wanted, {"a": 2, "b": "x"}) == [
        "a: is 2, must be 1",
        "c: is False, must be True",
    ]


@pytest.mark.parametrize(
    "config", [*streams.stream_configs(SUBJECTS), streams.consumer_config(SUBJECTS)]
)
def test_a_field_of_a_later_server_must_be_unset(config: Mapping[str, Any]) -> None:
    found = {**config, "later": {"field": 1}, "unset": False, "none": -1, "metadata": {"a": "b"}}

    assert streams.differences(config, found, streams.NEUTRAL) == [
        "later: is {'field': 1}, must be unset"
    ]


def test_a_mirror_is_bounded_as_its_original_and_drops_the_oldest() -> None:
    originals = {config["name"]: config for config in streams.stream_configs(SUBJECTS)}
    mirrors = {config["name"]: config for config in streams.mirror_configs(SUBJECTS, "hub")}

    assert [*mirrors] == ["HOSTD_EVT_test", "HOSTD_DEAD_test", "KV_HOSTD_STATE_test"]
    for name, mirror in mirrors.items():
        bounds = ("max_age", "max_bytes", "max_msgs_per_subject", "storage")
        assert {each: mirror.get(each) for each in bounds} == {
            each: originals[name].get(each) for each in bounds
        }
        assert mirror["discard"] == "old"  # a full original may refuse: a copy has nobody to tell
        assert mirror["description"] == f"{originals[name]['description']} (mirror)"
        assert not {"subjects", "duplicate_window"} & mirror.keys()
    republished = [name for name, mirror in mirrors.items() if "republish" in mirror]
    assert republished == ["KV_HOSTD_STATE_test"]


def test_own_subjects_belong_to_their_streams() -> None:
    own = "hostd.v1.test.h1"
    found = [streams.stream_of(SUBJECTS, f"{own}.{kind}.host") for kind in ("evt", "cmd", "x")]

    assert found == ["HOSTD_EVT_test", None, None]
    assert streams.stream_of(SUBJECTS, "_INBOX.evt.x") is None
