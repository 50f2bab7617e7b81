"""Choice of the held-out split: validation, then val, then test, for every kind of data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ubn_zoo.data.splits import HELD_OUT_SPLITS, find_eval_split
from ubn_zoo.errors import DataError


@pytest.mark.parametrize("dataset", ["folder", "memory", "wds"])
def test_the_test_split_is_used_only_without_another_held_out_split(dataset: str, tmp_path: Path) -> None:
    if dataset == "wds":
        pytest.importorskip("webdataset")
    with pytest.raises(DataError, match=r"has none of validation, val, test; it needs one of them, or set test_split"):
        find_eval_split(tmp_path, dataset)
    for count, split in enumerate(reversed(HELD_OUT_SPLITS), 1):
        if dataset == "wds":
            splits = dict.fromkeys(("train", *HELD_OUT_SPLITS[-count:]))
            (tmp_path / "_info.json").write_text(json.dumps({"splits": splits}), encoding="utf-8")
        elif split == "val":
            (tmp_path / "val.tar").touch()
        else:
            (tmp_path / split).mkdir()
        assert find_eval_split(tmp_path, dataset) == split
