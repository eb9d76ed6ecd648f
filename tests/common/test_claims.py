"""Claims of output folders: one request per folder, and one mechanism for all commands."""

import json

import pytest

from pixelflow_jax.common import UserError, claims, files, locks
from pixelflow_jax.common.claims import Description, claim

ASKED = Description({"seed": 1, "labels": [3]}, "samples of another request")


def take(folder, description=ASKED) -> bool:
    with claim(folder, description) as (there, check):
        check()
        assert locks.holder(folder) is not None
    assert locks.holder(folder) is None
    return there


def test_the_same_request_comes_back(tmp_path):
    """Catches a folder that its own request is refused, and a description that is not written first."""
    out = tmp_path / "new" / "out"
    assert [take(out), take(out)] == [False, True]
    assert json.loads((out / "settings.json").read_text()) == ASKED.values
    with pytest.raises(UserError, match=f"--out={out} is in use by process"), locks.held(out, "--out"):
        take(out)


def test_other_folders_are_refused(tmp_path):
    """Catches files that are not ours being written over, and a refusal that does not say why."""
    (tmp_path / "thesis.tex").write_text("ten years of work")
    with pytest.raises(
        UserError, match=f"--out={tmp_path} holds files but no settings.json; name a new"
    ):
        take(tmp_path)
    beside = Description(ASKED.values, "x", beside=("thesis.tex",))
    assert not take(tmp_path, beside)
    for text, message in (
        ("{", "not a JSON file"),
        ("[1]", "does not say what --out="),
        ('{"seed": 2, "labels": [3], "new": 1}', "of another request .seed, new differ.; name a new"),
    ):
        (tmp_path / "settings.json").write_text(text)
        with pytest.raises(UserError, match=message):
            take(tmp_path, beside if text[0] != "{" else ASKED)
    assert (tmp_path / "thesis.tex").read_text() == "ten years of work"
    assert locks.holder(tmp_path) is None


@pytest.mark.parametrize("value", [None, 27])
def test_removed_keys(tmp_path, value):
    """Catches a key without effect that keeps a folder from being completed, and one with an effect."""
    files.write_json(tmp_path / "settings.json", {**ASKED.values, "nfe_budget": value})
    if value is None:
        assert take(tmp_path)
    else:
        with pytest.raises(UserError, match="nfe_budget=27, which was removed"):
            take(tmp_path)


def test_a_claim_between_the_look_and_the_lock(tmp_path, monkeypatch):
    """Catches two requests that look at a new folder together, of which the later takes it over."""
    held = claims.locks.held

    def slow(folder, flag):
        files.write_json(tmp_path / "settings.json", {"seed": 2})
        return held(folder, flag)

    monkeypatch.setattr(claims.locks, "held", slow)
    with pytest.raises(UserError, match="seed, labels differ"):
        take(tmp_path)
    assert json.loads((tmp_path / "settings.json").read_text()) == {"seed": 2}
