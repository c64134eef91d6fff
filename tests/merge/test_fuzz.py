"""Recipes damaged in a thousand ways: each is either parsed or rejected with one line."""

from __future__ import annotations

import contextlib
import copy
import random
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron.common.errors import UserError
from tests.support.merges import good_recipe
from tools.merge.job import MergeJob, MergeRequest
from tools.merge.recipe_file import read_recipe

pytestmark = pytest.mark.unit

VALUES = (None, 0, -1, 2.5, "", "mlp", True, [], [1], {}, {"value": 1}, float("inf"), 10**40, "\0", [[1]], {"a": None})


def mutated(body: Any, chance: random.Random) -> Any:
    """A recipe with one to three of its values replaced, dropped or renamed."""
    body = copy.deepcopy(body)
    for _ in range(chance.randint(1, 3)):
        here: Any = body
        while True:
            keys = list(here) if isinstance(here, dict) else list(range(len(here)))
            if not keys:
                break
            key = chance.choice(keys)
            if isinstance(here[key], dict | list) and here[key] and chance.random() < 0.7:
                here = here[key]
                continue
            kind = chance.randrange(3)
            if kind == 0:
                here[key] = chance.choice(VALUES)
            elif kind == 1:
                del here[key]
            elif isinstance(here, dict):
                here[chance.choice((str(key)[1:], f"{key}s", "base", "label"))] = here.pop(key)
            break
    return body


def test_fuzzed_recipes(folders: Path) -> None:
    chance = random.Random(11)
    bodies = [good_recipe(folders)]
    bodies.append(bodies[0] | {"merge_method": "ties"})
    bodies.append({"merge_method": "linear", "models": copy.deepcopy(bodies[0]["models"]), "dtype": "float32"})
    for entry in bodies[2]["models"]:
        del entry["parameters"]["density"]
    refusals: list[str] = []
    understood = 0
    for number in range(600):
        body = mutated(bodies[number % 3], chance)
        path = folders / "fuzz.yml"
        path.write_text(yaml.safe_dump(body))
        try:
            MergeJob(read_recipe(path), MergeRequest(folders / "out"))
            understood += 1
        except UserError as error:
            refusals.append(str(error))
    assert not any("\n" in message for message in refusals)
    assert len({re.sub(r"[^a-z ]", "", message.split(": ")[-1])[:40] for message in refusals}) > 25
    assert understood > 20


def test_fuzzed_text(folders: Path) -> None:
    chance = random.Random(12)
    text = yaml.safe_dump(good_recipe(folders)).encode()
    for _ in range(400):
        out = bytearray(text)
        for _ in range(chance.randint(1, 4)):
            out[chance.randrange(len(out))] = chance.randrange(256)
        path = folders / "fuzz.yml"
        path.write_bytes(bytes(out))
        with contextlib.suppress(UserError):
            read_recipe(path)
