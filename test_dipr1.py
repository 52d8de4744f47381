"""What can go wrong in DIP-R1, told as tests: `pytest test_dipr1.py`, on a laptop CPU, with a tiny model.

`python test_dipr1.py` times the naive way of these tests and ours, side by side.

Each clever thing in dipr1.py is held against an independent, naive way of computing the same.
"""
import argparse
import contextlib
import copy
import dataclasses
import functools
import itertools
import json
import math
import os
import pickle
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
import unicodedata
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

if __name__ != "__main__" and "gpu" not in sys.argv:  # tests run on the CPU, unless `-m gpu` asks for a GPU
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image, ImageOps
from safetensors.torch import load_file, save
from scipy.io import savemat
from tokenizers import normalizers
from tqdm import tqdm
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import data_prep
import dipr1
from dipr1 import Config, Group, Response

HERE = Path(__file__).parent
REAL = HERE.parent / "shared" / "real"  # real annotation files are not a part of the project
ONE, CROWD = [[0, 0, 10, 10]], [[10, 10, 30, 50], [25, 12, 45, 52], [50, 40, 70, 90], [75, 20, 95, 70]]
TWO = np.array([[0.0, 0, 10, 10], [20, 0, 30, 10]])
PERSON, OTHER = [0, 0, 28, 56], [56, 0, 84, 56]
NAN, INF = float("nan"), float("inf")
SCENARIOS = [dict(), dict(zero_odd=True, beta=0.0), dict(freeze_vision=True, tokens_per_forward=10_000),
             dict(num_iterations=2, gradient_checkpointing=True)]  # of training with two processes
IMAGE = (100, 80)  # width, height of the pictures that we make
replaced = functools.partial(mock.patch.multiple, dipr1)  # names of dipr1, for a while
read_lines = functools.partial(data_prep.read_jsonl, check=dict)
needs_real = pytest.mark.skipif(not REAL.exists(), reason="needs the real annotation files")
boxes = lambda *rows: np.array(rows, float).reshape(-1, 4)
main = lambda *flags: dipr1.main([str(flag) for flag in flags])  # the command line, in this process
LINE = {"image": "x.png", "width": 50, "height": 50, "target": "person", "boxes": [], "ignore": []}
line_of = lambda **fields: LINE | fields  # a line of data, as data_prep.py writes it


def completion(look="[[0, 0, 28, 28]]", answer="[[0, 0, 28, 56]]", think="two people"):
    return f"<think>{think}</think><look>{look}</look><answer>{answer}</answer>"


def random_boxes(rng, n, size=20):
    corners = rng.integers(0, size, (n, 2, 2))
    return np.concatenate([corners.min(1), corners.max(1) + 1], axis=1).astype(float)


def prompt_of(task, truth=(), ignore=()):
    """What the rewards need of a prompt: an image of 100 x 100 pixels."""
    truth = truth if isinstance(truth, str) else np.array(truth, float)
    return SimpleNamespace(size=(100, 100), task=dipr1.TASKS[task], truth=truth, ignore=boxes(*ignore))


def judged(text, prompt):
    """The format and the answer reward of a completion."""
    form, _, answer = dipr1.group_rewards(Group(prompt, [], texts=[text]), 0.65)[0].tolist()
    return form, answer


def write(path, *content):
    """Bytes or text as they are, anything else as JSON, a line each -> the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = [part if isinstance(part, (bytes, str)) else json.dumps(part) for part in content]
    path.write_bytes(b"\n".join(part if isinstance(part, bytes) else part.encode() for part in texts))
    return path


def refused(said, call, *args, **options):
    """The call ends the program with one line, which matches."""
    with pytest.raises(SystemExit, match=said) as stop:
        call(*args, **options)
    assert type(stop.value.code) is str and "\n" not in stop.value.code


# ------------------------------------------------------------------------------------------------------------
# Parsing: no completion crashes it, none gets more credit than it should, and right answers are understood


@pytest.fixture(autouse=True)
def one_process():
    """What `main` does first; it leaves the group of processes in the end."""
    dipr1.join_processes(Config())


@pytest.mark.parametrize("text", [
    "[[1, 2, 3, 4], [5, 6, 7.5, 8]]", "```json\n[[1e0,2,3,4.00000000000000000000],[5,6,75e-1,8]]```",
    '```JSON [{"bbox_2d": [1, 2, 3, 4], "score": 0.9, "attributes": {"hidden": [true]}, "label": "a"},'
    '{"label": "b", "bbox_2d": [5, 6, 7.5, 8]}]```',
    '[{"bbox_2d": [1, 2, 3, 4], "label": 7}, [5, 6, 7.5, 8]]',
])
def test_what_models_write_is_understood_bare_in_qwens_form_and_fenced(text):
    assert dipr1.parse_boxes(text).tolist() == [[1, 2, 3, 4], [5, 6, 7.5, 8]]
    assert dipr1.format_reward(completion(answer=text)) == dipr1.format_reward(completion(look=text)) == 1


@pytest.mark.parametrize("text", [
    "[[1, 2, 3]]", "[[1, 2, 3, 4, 5]]", "[[1, 2], [3, 4]]", "[1, 2]", "[[1, 2, 3, 4],]", "[[1, 2, 3, 4]] x",
    "[[1, 2, 3, NaN]]", "[[1e9, 2, 3, 4]]", "[-1e6, 2, 3, 4]", "[[1, 2, 3, true]]", '[[1, 2, 3, "4"]]',
    f"[[1, 2, 3, {'9' * 400}]]", f"[[1, 2, 3, {'9' * 200_000}]]", f"[[1.{'1' * 200_000}, 2, 3]]", "4",
    "[[[1, 2, 3, 4]]]", "[[1, 2, 3, 4], 5]", "[[__import__('os'), 2, 3, 4]]", '[{"bbox_2d": [1]}]',
    '[{"box": [1, 2, 3, 4]}]', '[{"bbox_2d": "1, 2, 3, 4"}]', "```json\n[[1, 2, 3, 4]]",
    *(piece * 20_000 for piece in ("[", '{"bbox_2d":', "[[1, 2, 3, 4", '{"bbox_2d": [1, 2, 3, 4]', "```json",
                                   '[{"label": "', "<answer>", "<look>", "\0", "e\u0301\u0323", "\ud800")),
    "[" * 100_000 + "]" * 100_000, "[[1" + " " * 100_000 + "," + " " * 100_000 + "2",
    '[{"label": "' + "x" * 200_000, '[{"label": "' + '\\"' * 100_000,
], ids=lambda text: ascii(text[:20]))
def test_what_is_not_a_list_of_boxes_is_none_in_no_time(text):
    started = time.process_time()
    rewards = dipr1.format_reward(completion(answer=text)), dipr1.format_reward(completion(look=text))
    assert dipr1.parse_boxes(text) is None and rewards == (0, 0)
    assert time.process_time() - started < 0.3


def test_format_rewards_want_the_whole_template_and_nothing_else():
    good = completion()
    for text in (good, f"\n {good.replace('><', '> <')} \n", completion(look="[]", answer="[]")):
        assert dipr1.format_reward(text) == 1
    for bad in (good + "x", "x" + good, good.replace("</look>", "</look>x"), good + good, good[:-1],
                good.replace("look", "LOOK"), "<answer>[]</answer><look>[]</look><think>t</think>",
                completion(think="a <look>"), completion(think=" \n"), "",
                good.replace("<look>[[0, 0, 28, 28]]</look>", "")):
        assert dipr1.format_reward(bad) == 0, bad
    # A right answer in a broken frame is still read, but not an ambiguous one.
    assert dipr1.parse_response("hm <answer>[[1, 2, 3, 4]]</answer>").answer.tolist() == [[1, 2, 3, 4]]
    for text in ("<answer>[]</answer>" * 2, "</answer>[]<answer>", "<answer>[<look>]</answer>"):
        assert dipr1.parse_response(text).answer is None
    # Perception-R1's format is one or minus one.
    for text, rewards in ((f"<answer>{ONE}</answer>", (1, 1)), ("\n <answer>[]</answer> ", (1, 0)),
                          ("<answer>nobody</answer>", (-1, 0)), (str(ONE), (-1, 0)),
                          (f"<think>hm</think><answer>{ONE}</answer>", (-1, 1))):
        assert judged(text, prompt_of("perception-r1", ONE)) == rewards, text
    for text, rewards in (("<answer>a</answer> b", (-1, 1)), ("a", (-1, 0)), ("</answer>a<answer>", (-1, 0))):
        assert judged(text, prompt_of("ocr", "a")) == rewards, text


@pytest.mark.slow
def test_a_hundred_thousand_mutated_completions_earn_finite_rewards_within_bounds():
    rng, malformed, earned = np.random.default_rng(0), 0, 0
    truth = boxes([10, 10, 40, 60], [30, 12, 70, 66])
    truths = {"grounding": truth[:1], "counting": truth[:, :2], "ocr": "[[12, 30]] and"}
    prompts = [prompt_of(task, truths.get(task, truth), [[80, 0, 100, 30]]) for task in dipr1.TASKS]
    qwen = '[{"bbox_2d": [9, 11, 41, 58], "label": "a"}, {"bbox_2d": [31, 12, 69, 66], "label": "b"}]'
    whole = [completion(), completion(answer=qwen), completion(look="[]", answer=f"```json\n{qwen}\n```"),
             completion(look="[[5, 5, 80, 80]]", answer="[[10, 10, 40.5, 60], [30, 12, 70, 66]]")]
    pieces = [f"<{slash}{name}>" for name in dipr1.SECTIONS for slash in ("", "/")]
    pieces += '0123456789-.,[]{}"<>/ \\\n\0é'
    for number, prompt in zip(range(12_500), itertools.cycle(prompts)):
        looks, texts = "look" in prompt.task.sections, []
        for _ in range(8):
            text = whole[rng.integers(4)]
            text = text if looks else text.partition("</look>")[2]
            for _ in range(rng.integers(1, 6)):  # accidents: a piece is lost, repeated or replaced
                a, b, c = sorted(rng.integers(0, len(text) + 1, 3))
                b = rng.choice([a, a + 1, b])
                others = ["", text[a:b] * 2, text[b:c], "9" * (c - b), *pieces]
                text = text[:a] + others[rng.integers(len(others))] + text[b:]
            texts.append(text)
        rewards = dipr1.group_rewards(Group(prompt, [], texts=texts), 0.65)
        assert rewards.shape == (8, 3) and bool((rewards <= 1).all()), texts
        assert bool((rewards >= torch.tensor([looks - 1, 0, 0])).all()), texts
        malformed += (rewards[:, 0] <= 0).sum().item()
        earned += (rewards[:, 2] > 0).sum().item()
    assert malformed > 50_000 and earned > 5_000, "the accidents should be bad, and not all fatal"


# ------------------------------------------------------------------------------------------------------------
# Boxes, rewards and loss: by hand, by brute force, and what known hacks earn


def test_iou_equals_counting_pixels_and_odd_boxes_overlap_nothing():
    rng = np.random.default_rng(0)
    a, b = random_boxes(rng, 6), random_boxes(rng, 5)
    def pixels(box):
        return {(x, y) for x in range(int(box[0]), int(box[2])) for y in range(int(box[1]), int(box[3]))}
    for of_first in (False, True):
        naive = [[len(p & q) / len(p if of_first else p | q) for q in map(pixels, b)] for p in map(pixels, a)]
        assert np.allclose(dipr1.box_iou(a, b, of_first), naive)
    odd = [[10, 10, 5, 5], [3, 3, 3, 9], [99, 99, 120, 120], [-50, -50, -9, -9]]  # inverted, empty, outside
    assert (dipr1.box_iou(odd, [[0, 0, 20, 20]]) == 0).all() and dipr1.box_iou([], a).shape == (0, 6)


def test_matching_the_rewards_made_of_it_and_levenshtein_equal_trying_everything():
    def best(worth):
        worth = worth if len(worth) <= len(worth.T) else worth.T
        pairings = itertools.permutations(range(worth.shape[1]), len(worth))
        return max(sum(row[j] for row, j in zip(worth, pairing)) for pairing in pairings)
    rng = np.random.default_rng(1)
    for n, m in rng.integers(1, 6, (200, 2)).tolist():
        points, places = rng.uniform(-20, 130, (n, 2)), rng.uniform(0, 100, (m, 2))
        far = np.array([[min(1, math.dist(p, q) / math.hypot(100, 80)) for q in places] for p in points])
        truth = random_boxes(rng, m)
        pred = np.concatenate([truth + rng.normal(0, 2, truth.shape), random_boxes(rng, n)])
        pred = rng.permutation(pred)[:n]
        iou = dipr1.box_iou(pred, truth)
        rows, cols, ious = dipr1.match_boxes(pred, truth)
        assert len(set(rows)) == len(rows) and len(set(cols)) == len(cols) and (ious >= 0.5).all()
        assert np.array_equal(ious, iou[rows, cols]) and np.isclose(ious.sum(), best(iou * (iou >= 0.5)))
        assert dipr1.detection_reward(pred, truth) == pytest.approx(best(iou) / max(n, m))
        assert dipr1.counting_reward(points, places, 100, 80) == pytest.approx(best(1 - far) / max(n, m))
    @functools.cache
    def distance(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(distance(a[1:], b) + 1, distance(a, b[1:]) + 1, distance(a[1:], b[1:]) + (a[0] != b[0]))
    for length in (0, 1, 2, 5, 30) * 30:
        a, b = ("".join(rng.choice(list("abcé😀"), rng.integers(0, length + 1))) for _ in range(2))
        assert dipr1.levenshtein(a, b) == distance(a, b)


@pytest.mark.parametrize("pred, gt, ignore, expected", [
    (TWO, TWO, None, 1), (TWO[:1], TWO, None, 0.25 + 0.75 / 2), (TWO, TWO[:1], None, 0.25 / 2 + 0.75),
    (boxes(), boxes(), None, 1), (boxes(), TWO, None, 0), (TWO, boxes(), None, 0),
    (np.repeat(TWO, 5, axis=0), TWO, None, 0.25 / 5 + 0.75),  # duplicates
    (boxes([0, 0, 30, 10]), TWO, None, 0),  # one box around everybody
    (boxes(*TWO, [900, 900, 950, 950], [9, 9, 3, 3]), TWO, None, 0.25 / 2 + 0.75),  # boxes nowhere count, too
    (TWO, TWO[:1], boxes([18, 0, 40, 40]), 1),  # the second lies in an ignore region
    (TWO, TWO[:1], boxes([26, 0, 40, 40]), 0.25 / 2 + 0.75),  # ... less than half of it
    (TWO, TWO, boxes([0, 0, 99, 99]), 1), (TWO, boxes(), boxes([0, 0, 99, 99]), 1),  # matched ones count
    (boxes([9, 9, 3, 3]), boxes(), boxes([0, 0, 99, 99]), 0),  # an inverted box lies nowhere
])
def test_accuracy_reward_by_hand(pred, gt, ignore, expected):
    assert dipr1.accuracy_reward(pred, gt, ignore, recall_weight=0.75) == pytest.approx(expected)


def test_equal_weights_reward_dropping_a_doubtful_box_and_the_default_does_not():
    """The known trap, on a box that is right in 35% of the cases while four of five others are."""
    gt, wrong = boxes(*[[20 * i, 0, 20 * i + 15, 40] for i in range(6)]), [500, 0, 515, 40]
    def gain(**w):
        without, right, missed = (dipr1.accuracy_reward(boxes(*gt[:4], wrong, *doubtful), gt, **w)
                                  for doubtful in ([], [gt[4]], [[600, 0, 615, 40]]))
        return 0.35 * right + 0.65 * missed - without
    assert gain(recall_weight=0.5) < 0 < gain()


def test_look_rewards_equal_the_definition_a_cell_and_a_completion_at_a_time():
    def count(boxes, x, y):
        return sum(x1 <= x <= x2 and y1 <= y <= y2 for x1, y1, x2, y2 in boxes)
    def naive(response, others):
        both = looks = unsure = 0.0
        for y, x in itertools.product(range(7, 56, 14), range(7, 84, 14)):
            u = min(1, 4 * np.var([count(other.answer, x, y) for other in others])) if len(others) > 1 else 0
            look = count(response.look, x, y) > 0
            both, looks, unsure = both + look * u, looks + look, unsure + u
        return 2 * both / (looks + unsure) if unsure else 0.0
    rng = np.random.default_rng(2)
    rows = lambda: None if rng.random() < 0.15 else random_boxes(rng, rng.integers(0, 4), 80)
    for _ in range(30):
        responses = [Response("t", rows(), rows(), True) for _ in range(rng.integers(2, 8))]
        for response, reward in zip(responses, dipr1.look_rewards(responses, 84, 56)):
            others = [other for other in responses if other is not response and other.answer is not None]
            assert reward == pytest.approx(0 if response.look is None else naive(response, others))


def test_dip_r1s_rewards_and_what_hacks_of_the_look_earn_by_hand():
    def rewards(*looks_and_answers):
        prompt = prompt_of("dip-r1", [PERSON, [56, 0, 84, 100]])
        texts = [completion(str(look), str(answer)) for look, answer in looks_and_answers]
        return dipr1.group_rewards(Group(prompt, [], texts=texts), 0.65)
    split = ([], [PERSON]), ([], [PERSON, OTHER])  # two completions that split over OTHER
    look = lambda regions: rewards((regions, []), *split)[0, 1].item()
    assert look([OTHER]) == look([OTHER] * 50) == 1  # the doubtful person; duplicates change nothing
    assert look([PERSON]) == look([]) == look(None) == 0  # all agree on that person
    assert look([[56, 0, 84, 28]]) == pytest.approx(2 * 4 / (4 + 8))
    assert look([[0, 0, 100, 100]]) == pytest.approx(2 * 8 / (49 + 8))  # the whole image: 0.28
    # Being the outlier does not manufacture what one is paid for: the others agree, there is nothing to find.
    assert rewards(([[84, 84, 98, 98]], [[84, 84, 98, 98]]), split[0], split[0])[0, 1] == 0
    # Format and accuracy; the third answer is clipped to the image, which makes it right.
    found = rewards(*split, ([], [PERSON, [56, 0, 84, 999]]), (None, [])).tolist()
    assert found == [[1, 0, pytest.approx(0.35 + 0.65 / 2)], [1, 0, 1], [1, 0, 1], [0, 0, 0]]


@pytest.mark.parametrize("task, truth, answer, reward", [
    ("grounding", ONE, ONE, 1), ("grounding", ONE, "[0, 0, 10, 5]", 0.5), ("grounding", ONE, ONE * 2, 0),
    ("grounding", ONE, [], 0), ("grounding", ONE, '```\n{"bbox_2d": [0, 0, 10, 10], "label": "a"}```', 1),
    ("grounding", [[90, 90, 100, 100]], [[90, 90, 900, 900]], 1), ("grounding", ONE, [[0, 0, 99, 99]], 0.01),
    ("counting", [[0, 0]], [[100, 100]], 0), ("counting", [[0, 0]], [[9999, 0]], 0), ("counting", ONE, [], 0),
    ("counting", [[0, 0]], "[50, 50]", 0.5), ("counting", [[0, 0]], '{"point_2d": [0, 0], "label": "a"}', 1),
    ("counting", np.zeros((0, 2)), [], 1), ("counting", np.zeros((0, 2)), [[1, 1]], 0),
    # The weak spot of the definition: a right count, anywhere.
    ("counting", [[20, 30], [35, 32], [60, 65], [85, 45]], [[50, 50]] * 4, 0.8),
    ("perception-r1", CROWD, CROWD * 10, 0.1), ("perception-r1", CROWD, [[0, 0, 100, 100]] * 4, 0.09),
    ("perception-r1", boxes(), [], 1), ("perception-r1", boxes(), ONE, 0),
    ("perception-r1", ONE, [[10, 10, 0, 0]], 0),
    ("ocr", "kitten", " kitten\n", 1), ("ocr", "kitten", "sitting", 4 / 7), ("ocr", "kitten", "", 0),
    ("ocr", "", "", 1), ("ocr", "", "x", 0), ("ocr", "caf\u00e9", "cafe\u0301", 1),
    ("ocr", "cat", "cat " * 400, 3 / 1599), ("ocr", "<answer> a </answer>", "<answer> a </answer>", 1),
])
def test_answer_rewards_and_what_hacks_of_them_earn_by_hand(task, truth, answer, reward):
    form, earned = judged(f"<answer>{answer}</answer>", prompt_of(task, truth))
    assert form == 1 and earned == pytest.approx(reward, abs=1e-3)


def test_advantages_equal_the_formula_and_vanish_where_all_agree():
    row = [0.0, 1.0, 2.0, 5.0]
    std = math.sqrt(sum((r - 2) ** 2 for r in row) / 3)
    advantages = dipr1.group_advantages(torch.tensor([row, [0.1] * 4], dtype=torch.float64))
    assert advantages[0].tolist() == pytest.approx([(r - 2) / (std + 1e-4) for r in row], abs=1e-12)
    for value in (0.1, 1 / 3, 0.7, 1e9):
        assert (dipr1.group_advantages(torch.full((3, 7), value)) == 0).all()  # exactly, not rounding


@pytest.mark.parametrize("with_kl", [False, True])
def test_loss_and_gradient_equal_the_formula(with_kl):
    """A token at a time, in double precision, and its slope by differences."""
    def naive(lp, lo, lr, a, eps=0.2, beta=0.3):
        rho, d = math.exp(lp - lo), lr - lp if with_kl else 0
        return -min(rho * a, min(max(rho, 1 - eps), 1 + eps) * a) + beta * (math.exp(d) - d - 1)
    ratios = [0.5, 0.79, 0.9, 1.0, 1.1, 1.21, 2.0]  # inside and outside the clip
    old = torch.full((14,), -1.3, dtype=torch.float64)
    logp = (old + torch.tensor(ratios * 2, dtype=torch.float64).log()).requires_grad_()
    ref = old + torch.linspace(-2, 2, 14, dtype=torch.float64)
    advantage = torch.tensor([1.7] * 7 + [-0.6] * 7, dtype=torch.float64)
    loss, stats = dipr1.grpo_loss(logp, old, ref if with_kl else None, advantage, clip_eps=0.2, beta=0.3)
    loss.backward()
    tokens = list(zip(logp.tolist(), *(x.tolist() for x in (old, ref, advantage))))
    slopes = [(naive(lp + 1e-6, *others) - naive(lp - 1e-6, *others)) / 2e-6 / 14 for lp, *others in tokens]
    assert loss.item() == pytest.approx(np.mean([naive(*token) for token in tokens]), abs=1e-12)
    assert logp.grad.tolist() == pytest.approx(slopes, abs=1e-8)
    assert stats["clip_fraction"] == pytest.approx(4 / 14)  # 1.21, 2.0 where A > 0; 0.5, 0.79 where A < 0
    for far in (-1e4, 1e4):  # a token that a policy has abandoned gives a large number, not infinity
        loss, _ = dipr1.grpo_loss(logp, logp.detach() + far, ref + far, advantage, 0.2, 0.04)
        assert torch.isfinite(loss) and torch.isfinite(torch.autograd.grad(loss, logp)[0]).all()


# ------------------------------------------------------------------------------------------------------------
# The model: a packed group against the plain way


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A tiny Qwen2.5-VL on disk with six images of several sizes: (folder of the model, JSONL)."""
    folder = tmp_path_factory.mktemp("tiny")
    data_prep.tiny(folder / "model")
    rng, records = np.random.default_rng(0), []
    sizes = [(112, 112), (168, 84), (70, 150), (112, 112), (300, 40), (56, 56)]
    for number, (width, height) in enumerate(sizes):
        image = folder / f"{number}.png"
        people = [[5, 5, 30, 35], [20, 10, 45, 38], [1, 1, 9, 12]][: number % 4]
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(image)
        records.append(line_of(image=str(image), width=width, height=height, boxes=people))
    return folder / "model", write(folder / "train.jsonl", *records)


def load(tiny, eos=0.0, gradient_checkpointing=False, **options):
    """A fresh (policy, encoder, prompts); with `eos` above 0 it writes its second EOS now and then."""
    cfg = Config(model=str(tiny[0]), gradient_checkpointing=gradient_checkpointing, **options)
    policy, encoder = dipr1.setup(cfg)
    noise = torch.randn(128, generator=torch.Generator().manual_seed(0)).to(encoder.device)
    policy.model.lm_head.weight.data[encoder.eos[1]] += eos * noise
    prompts = [encoder.prompt(*pair) for pair in enumerate(dipr1.load_records(tiny[1]))]
    return policy, encoder, [prompt.to(encoder.device) for prompt in prompts]


def random_group(prompt, lengths=(5, 9, 1, 7), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Group(prompt, [torch.randint(300, 400, (n,), generator=generator) for n in lengths])


def plain(policy):
    """A copy of the policy that attends as transformers has it."""
    policy = copy.deepcopy(policy)
    policy.model.model.language_model.set_attn_implementation("sdpa")
    return policy


def plain_logits(policy, prompt, completions, keep):
    """What a careful user of transformers writes: a padded row a completion, each with a copy of the image ->
    (G, keep, V) log-softmax of the last columns."""
    longest, G = max(map(len, completions)), len(completions)
    ids = torch.stack([torch.cat([prompt.ids, o, o.new_zeros(longest - len(o))]) for o in completions])
    lengths = torch.tensor([[len(prompt.ids) + len(o)] for o in completions], device=ids.device)
    mask = torch.arange(ids.shape[1], device=ids.device) < lengths
    logits = policy.model(
        input_ids=ids, attention_mask=mask.long(), use_cache=False,
        pixel_values=prompt.pixels.repeat(G, 1), image_grid_thw=prompt.grid.repeat(G, 1),
        mm_token_type_ids=(ids == policy.model.config.image_token_id).int(), logits_to_keep=keep,
    ).logits.float() / policy.temperature
    logits[..., policy.forbidden < 0] = -float("inf")
    return logits.log_softmax(-1)


def plain_logprobs(policy, group):
    logp = plain_logits(policy, group.prompt, group.completions, max(map(len, group.completions)) + 1)
    return torch.cat([logp[i, torch.arange(len(o)), o] for i, o in enumerate(group.completions)])


@pytest.mark.parametrize("temperature, checkpointing", [(1.0, False), (0.7, True)])
def test_packed_groups_equal_one_padded_forward_a_completion(tiny, temperature, checkpointing):
    """For prompts of several lengths with 1 to 5 completions; the softmax is computed in three chunks."""
    policy, _, prompts = load(tiny, temperature=temperature, gradient_checkpointing=checkpointing)
    naive = plain(policy.train())
    lengths = {2: (5, 9, 1, 7), 1: (3, 12), 5: (40,), 0: (2, 2, 2, 2, 2)}
    groups = [random_group(prompts[k], lengths[k], seed=k) for k in lengths]
    weight = torch.linspace(-1, 1, sum(group.n_tokens for group in groups))
    with replaced(token_logprobs=functools.partial(dipr1.token_logprobs, chunk=32)):
        packed = torch.cat(policy(groups))
    (packed * weight).mean().backward()
    padded = torch.cat([plain_logprobs(naive, group) for group in groups])
    (padded * weight).mean().backward()
    assert torch.allclose(packed, padded, atol=1e-5)
    groups[0].completions[0] += 7  # whose siblings do not see it
    changed = torch.cat(policy(groups))
    assert torch.equal(changed[5:], packed[5:]) and not torch.equal(changed[:5], packed[:5])
    for (name, ours), parameter in zip(policy.named_parameters(), naive.parameters()):
        assert torch.allclose(ours.grad, parameter.grad, atol=1e-5, rtol=1e-4), name
        assert parameter.grad.abs().max() > 0 or "k_proj.bias" in name, name


def test_a_prompt_is_the_checkpoints_template_in_three_dimensions_and_boxes_are_scaled_along_each_axis(tiny):
    """Without token types transformers silently counts 0, 1, 2, ... through the picture."""
    _, encoder, prompts = load(tiny)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "who?"}]}]
    chat, shipped = dipr1.CHAT.format(question="who?"), REAL / "qwen2.5-vl-3b/chat_template.jinja"
    if shipped.exists():
        assert chat == encoder.tokenizer.apply_chat_template(
            messages, chat_template=shipped.read_text(), tokenize=False, add_generation_prompt=True)
    seen = chat.replace("<|image_pad|>", "<|image_pad|>" * 6)  # 4 x 6 patches are 2 x 3 tokens
    ids, positions = encoder.chat("who?", 4, 6)
    assert ids.tolist() == encoder.tokenizer(seen, add_special_tokens=False).input_ids
    _, row, column = positions[:, ids == encoder.image_token]
    assert (row - row[0]).tolist() == [0, 0, 0, 1, 1, 1] and (column - column[0]).tolist() == [0, 1, 2] * 2
    size, seen = (1920, 1080), (1316, 728)
    there = dipr1.rescaled([[0, 0, 1920, 1080], [960, 540, 1920, 1080]], size, seen)
    assert there.tolist() == [[0, 0, 1316, 728], [658, 364, 1316, 728]]
    assert np.allclose(dipr1.rescaled(there, seen, size), [[0, 0, 1920, 1080], [960, 540, 1920, 1080]])
    assert dipr1.rescaled([[960, 540]], size, seen).tolist() == [[658, 364]]  # a point
    for prompt in prompts:  # boxes are scaled to the size that the tower sees
        assert prompt.grid.tolist() == [[1, prompt.size[1] // 14, prompt.size[0] // 14]]
        assert len(prompt.pixels) == prompt.grid.prod() == 4 * (prompt.ids == encoder.image_token).sum()
    assert np.allclose(prompts[2].truth / np.tile([56 / 70, 140 / 150], 2), prompts[2].record["boxes"])


@pytest.mark.parametrize("normalizer", [None, normalizers.NFC()])  # Qwen's tokenizer has the second
def test_the_truths_own_target_earns_everything_for_every_task_and_any_string(tiny, tmp_path, normalizer):
    _, encoder, _ = load(tiny)
    encoder.tokenizer.backend_tokenizer.normalizer = normalizer
    Image.new("RGB", (112, 112)).save(tmp_path / "x.png")  # so large that nothing is resized
    odd = ["人", "café", "cafe\u0301", "a\tb", "\\", '"A"', "{A}", "<look>", "</look>", "</answer>",
           "<answer>", " x ", "null", "[]", "```", "{target}", "{question}", "a\u2028", "<|", "\0", "<\u0301"]
    letters = [range(0x250), range(0x5D0, 0x6FF), range(0x4E00, 0x4F00)]
    letters = [*map(chr, itertools.chain(*letters)), *odd, *'<>\\"{}人😀\u1100\u1161\u200d']
    strings, lines = odd + ["".join(np.random.default_rng(k).choice(letters, 8)) for k in range(60)], []
    for task, text in itertools.product(dipr1.TASKS, strings):
        rng = np.random.default_rng(len(lines))
        corners = rng.integers(0, 60, (1 if task == "grounding" else len(lines) % 5, 2))
        rows = np.hstack([corners, corners + rng.integers(20, 52, corners.shape)]).tolist()
        line = line_of(width=112, height=112, task=task, target=text, boxes=rows, points=corners.tolist())
        lines.append(json.dumps(line | {"transcript": text}, ensure_ascii=len(lines) % 3 == 0))
    for index, record in enumerate(dipr1.load_records(write(tmp_path / "odd.jsonl", *lines))):
        prompt = encoder.prompt(index, record)
        question, target = encoder.tokenizer.decode(prompt.ids), encoder.target(prompt)
        assert (prompt.ids == encoder.image_token).sum() == 16  # no string adds a placeholder
        assert torch.isin(target, torch.tensor(encoder.eos)).tolist() == [False] * (len(target) - 1) + [True]
        asked = unicodedata.normalize("NFC", record["target"]) if normalizer else record["target"]
        assert asked in question or record["task"] == "ocr"
        group = Group(prompt, [target], texts=[encoder.decode(target)])
        assert dipr1.group_rewards(group, 0.65).tolist() == [[1, 0, 1]], (record, group.texts)


def test_a_target_in_whole_pixels_or_tenths_finds_every_box_of_a_pixel_or_more():
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 1000, (3000, 2))
    rows = np.hstack([corners, corners + rng.uniform(1, 8, (3000, 2))])
    written = dipr1.parse_boxes(dipr1.as_written(rows))
    assert (np.diagonal(dipr1.box_iou(rows, written)) >= 0.5).all()
    assert dipr1.as_written(rows[:0]) == "[]" and dipr1.as_written(np.array([[1.2, 3.6]])) == "[[1, 4]]"
    both = boxes([1.2, 3.6, 9.51, 7.8], [1.24, 2, 3, 4])
    assert dipr1.as_written(both) == "[[1, 4, 10, 8], [1.2, 2, 3, 4]]"


# ------------------------------------------------------------------------------------------------------------
# Rollout: what is sampled is what is scored


def sampled(policy, encoder, prompts, G, length, seed=0, step=0):
    uniforms = torch.stack([dipr1.draw_uniforms(seed, step, p.index, (G, length)) for p in prompts])
    return dipr1.rollout(policy, encoder, prompts, uniforms)


@pytest.mark.parametrize("frozen, greedy", [(False, False), (True, False), (False, True)])
def test_the_rollout_is_scored_as_sampled_and_equals_a_naive_loop_token_for_token(tiny, frozen, greedy):
    """The loop has no cache, shared prompt, dropped rows or decoder of our own: it computes the whole row,
    image and all, anew for every token. A completion ends with its first EOS, one of two."""
    policy, encoder, prompts = load(tiny, eos=0.4, temperature=0.9, freeze_vision=frozen)
    naive, prompts, lengths, n = plain(policy), prompts[1:3], [], 40
    if frozen:
        prompts = [dataclasses.replace(p, features=seen) for p, seen in zip(prompts, policy.see(prompts))]
    likeliest = torch.full((len(prompts), 1, n), NAN)
    groups = (dipr1.rollout(policy, encoder, prompts, likeliest) if greedy
              else sampled(policy, encoder, prompts, 4, n))
    with torch.no_grad():
        for group, logp in zip(groups, policy(groups)):
            assert torch.allclose(group.rollout_logp, logp, atol=1e-4)
        for group, row in itertools.product(groups, range(1 if greedy else 4)):
            uniforms, written = dipr1.draw_uniforms(0, 0, group.prompt.index, (4, n))[row], []
            while len(written) < n and not set(written) & set(encoder.eos):
                so_far = torch.tensor(written, dtype=torch.long)
                logp = plain_logits(naive, group.prompt, [so_far], 1)[0].clamp(min=-1e4)
                token = logp.argmax() if greedy else dipr1.inverse_cdf(logp, uniforms[len(written)][None])
                written.append(token.item())
            assert group.completions[row].tolist() == written
            lengths.append(len(written))
    assert len(encoder.eos) == 2 and len(group.completions) == row + 1
    assert greedy or sorted(lengths)[3] < n == max(lengths)  # half of the rows were dropped
    draws = [dipr1.draw_uniforms(*key, (2, 3)) for key in ((5, 3, 0), (6, 3, 0), (5, 4, 0), (5, 3, 1))]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(draws, 2)), "seed, step and prompt"


def test_inverse_cdf_draws_the_distribution_and_never_an_impossible_token():
    p = torch.tensor([0.0, 0.5, 0.0, 0.125, 0.375, 0.0])
    drawn = dipr1.inverse_cdf(p.log().clamp(min=-1e4).expand(8000, -1), torch.arange(8000) / 8000)
    assert torch.allclose(torch.bincount(drawn, minlength=6) / 8000, p, atol=1e-3)
    logits = torch.randn(500, 3000, generator=torch.Generator().manual_seed(0)) * 3
    logits[:, :100] = logits[:, 2000:] = -1e4
    for uniform in (0.0, 1 - 2**-24):  # the smallest and the largest number that is drawn
        drawn = dipr1.inverse_cdf(logits.log_softmax(-1), torch.full((500,), uniform))
        assert 100 <= drawn.min() and drawn.max() < 2000


def test_placeholders_are_never_sampled_and_other_special_tokens_break_the_format(tiny):
    """The policy may love <|image_pad|>: neither sampler nor scorer gives it a chance."""
    policy, encoder, prompts = load(tiny)
    policy.model.lm_head.weight.data[encoder.image_token] *= 1000  # dwarfs all others, or is dwarfed
    groups = sampled(policy, encoder, prompts[:2], 4, 20)
    assert encoder.image_token not in torch.cat([o for group in groups for o in group.completions])
    hidden, every = torch.randn(1, 128), torch.arange(len(policy.forbidden))
    scored = dipr1.token_logprobs(*policy.head(hidden.expand(len(every), -1)), every).exp()
    assert scored.sum().item() == pytest.approx(1, abs=1e-5) and (scored[policy.forbidden < 0] == 0).all()
    names = encoder.tokenizer.convert_ids_to_tokens(torch.where(policy.forbidden < 0)[0].tolist())
    assert set(names) == {f"<|{name}|>" for name in ("image_pad", "video_pad", "vision_start", "vision_end")}
    ids, stray, eos = encoder.tokens(completion()), encoder.tokens("<|im_start|>").tolist(), encoder.eos
    for rest, reward in (([], 1), (eos[:1], 1), (eos[1:], 1), (stray, 0), (stray + eos[:1], 0), (eos, 0)):
        assert dipr1.format_reward(encoder.decode(torch.tensor([*ids, *rest]))) == reward


def test_weights_that_are_not_finite_end_training_and_evaluation_with_a_line(tiny, tmp_path):
    """They would sample a token that does not exist or, greedily, the first one for ever."""
    shutil.copytree(tiny[0], model := tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][3, 4] = NAN
    write(model / "model.safetensors", save(weights, {"format": "pt"}))
    flags = training((model, tiny[1]), tmp_path / "run", "--sft_steps", 0)
    for more, said in (((), "step 1"), (("--eval", "--samples", 0), f"evaluating {model}"),
                       (("--eval", "--samples", 2), f"evaluating {model}")):
        refused(f"^{said}: the model's probabilities are not finite", main, *flags, *more)


@pytest.mark.parametrize("error", [None, RuntimeError("operation not permitted when stream is capturing"),
                                   torch.OutOfMemoryError("CUDA out of memory")])
def test_a_captured_step_answers_as_the_step_itself(monkeypatch, error):
    """CUDA's part is played: what is recorded is not run, a replay runs it on the same memory. Where a step
    cannot be recorded there is a warning, and it is not tried again, unless the memory is full."""
    graph, inputs = mock.Mock(), (torch.ones(2), torch.arange(2.0))
    def step(*places):
        result = sum(places)
        if graph.capture_begin.called and not graph.capture_end.called:
            if error:
                raise error
            result = torch.full((2,), NAN)
            graph.replay = lambda: result.copy_(sum(places))
        return result
    monkeypatch.setattr(torch, "cuda", cuda := mock.MagicMock(CUDAGraph=lambda: graph))
    monkeypatch.setattr(dipr1, "not_captured", [])
    if isinstance(error, torch.OutOfMemoryError):
        with pytest.raises(torch.OutOfMemoryError):
            dipr1.captured(step, *inputs)
        assert not dipr1.not_captured
        return
    with pytest.warns(UserWarning, match="not captured as a CUDA") if error else contextlib.nullcontext():
        run = dipr1.captured(step, *inputs)
    graph.capture_begin.assert_called_once_with(capture_error_mode="thread_local")
    cuda.current_stream().wait_stream.assert_called_once()
    for others in (inputs, (torch.ones(2), torch.ones(2)), inputs):
        assert torch.equal(run(*others), sum(others))
    assert graph.capture_end.called and inputs[1].tolist() == [0, 1]
    assert not error or dipr1.captured(step, *inputs) is step and graph.capture_begin.call_count == 1


def test_the_patch_embedding_is_the_product_that_a_gpu_computes_and_copies_have_their_own(tiny):
    policy, _, prompts = load(tiny)
    embed, pixels = policy.model.model.visual.patch_embed, torch.cat([p.pixels for p in prompts])
    weight, grad, ways = embed.proj.weight, torch.randn(len(pixels), 64), []
    for _ in range(2):
        out = embed(pixels)
        ways.append((out, *torch.autograd.grad(out, weight, grad)))
        dipr1.without_convolution(embed)
    assert all(torch.allclose(a, b, atol=1e-5, rtol=1e-4) for a, b in zip(*ways))
    twin = copy.deepcopy(embed)
    twin.proj.weight.data.zero_()
    assert not twin(pixels).any() and embed(pixels).any()


# ------------------------------------------------------------------------------------------------------------
# Credit, targets, data, training steps


def test_the_look_reward_reaches_exactly_the_tokens_up_to_its_closing_tag(tiny):
    _, encoder, prompts = load(tiny)
    texts = [completion(look="[[0, 0, 28, 28]]"), completion(look="[]"), "never closes <look>"]
    tokens = [encoder.tokens(text) for text in texts]
    for o, text in zip(tokens, texts):
        n = encoder.look_length(o)
        assert "</look>" not in encoder.tokenizer.decode(o[: n - 1])
        assert ("</look>" in encoder.tokenizer.decode(o[:n])) == ("</look>" in text)
    group, n = Group(prompts[0], tokens, texts=texts), encoder.look_length(tokens[0])
    only_looks_differ = torch.tensor([[[1, 0.9, 0.5], [1, 0, 0.5], [1, 0.2, 0.5]]], dtype=torch.float64)
    ours, plain = (dipr1.token_advantages(encoder, [group], only_looks_differ, Config(look_credit=credit))[0]
                   for credit in ("section", "completion"))
    assert (ours[:n] > 0).all() and (ours[n : len(tokens[0])] == 0).all()
    assert (plain[: len(tokens[0])] == ours[0]).all()


def test_the_supervised_look_is_weak():
    """Around a chain of people who overlap, three times in four; as often as not somewhere else too."""
    truth, crowd = boxes([5, 5, 30, 35], [80, 80, 90, 99], [35, 10, 60, 38], [20, 8, 45, 36]), [5, 5, 60, 38]
    assert dipr1.box_iou(truth[:1], truth[2:3]) == 0, "the ends of the chain do not touch"
    looks = [dipr1.weak_look(truth, 112, 56, seed) for seed in range(1000)]
    kept = [crowd in look.tolist() for look in looks]
    extra = [[box for box in look.tolist() if box != crowd] for look in looks]
    counts = [len(boxes) for boxes in extra]
    assert 0.7 < np.mean(kept) < 0.8 and 0.45 < np.mean(counts) < 0.55
    assert abs(np.corrcoef(kept, counts)[0, 1]) < 0.1
    assert all(0 <= x1 < x2 <= 112 and 0 <= y1 < y2 <= 56 for x1, y1, x2, y2 in itertools.chain(*extra))


def test_every_epoch_takes_each_record_once_in_an_order_of_its_own_and_the_rate_decays_to_zero():
    steps = [dipr1.batch_indices(10, 4, seed=0, step=s) for s in range(5)]  # the third step spans two epochs
    order = list(itertools.chain(*steps))
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10)) and order[:10] != order[10:]
    assert steps[3] == dipr1.batch_indices(10, 4, 0, 3) != dipr1.batch_indices(10, 4, 1, 3)
    assert len(dipr1.batch_indices(3, 8, seed=0, step=0)) == 8  # fewer records than a batch holds
    rates = [dipr1.learning_rate(step, 10, 2.0, 4) for step in range(11)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0] and rates[4:] == sorted(rates[4:])[::-1] and rates[10] == 0
    assert dipr1.learning_rate(0, 3, 2.0, 10) > 0, "a run shorter than its warm-up learns as well"


@pytest.mark.parametrize("line, said", [
    ("{", "Expecting"), ("[]", "object is expected, not .."), ('{"image": "x.png"}', "no 'width'"),
    ("\xff", "utf-8"), ('{"a": ' + "[" * 100_000, "RecursionError"), ('{"a": ' + "9" * 5000 + "}", "digits"),
    *[(json.dumps(line_of(**fields)), said) for fields, said in [
        ({"boxes": [[1, 2, 3, 4], [1, 2, 3]]}, r"boxes, row 2: \[1, 2, 3\] is not 4 numbers below a million"),
        ({"boxes": [[1, 2, NAN, 4]]}, "below a million"), ({"boxes": "1234"}, "a list of"),
        ({"boxes": [[3, 9, 8, 4]]}, "y1 < y2"), ({"boxes": [[-2, 2, 9, 4]]}, "outside"),
        ({"boxes": [[50, 9, 50.5, 14]]}, "x1 < x2"), ({"boxes": [[1, 2, 52, 4]]}, "outside the 50 x 50"),
        ({"task": "counting", "points": [[20, 51.5]]}, "outside"), ({"ignore": [[1]]}, "ignore, row 1"),
        ({"boxes": [[0.1, 0.2, 0.5, 1], [0, 0, 1, 1]]}, "fractions"), ({"target": None}, "a text"),
        ({"width": 0}, "width and height"), ({"width": "50"}, "width and height"), ({"image": 3}, "operand"),
        ({"width": 10_100}, "10100 x 50 pixels: a ratio above 200"), ({"points": [], "count": 2}, "0 points"),
        ({"count": "5"}, "count is '5'"), ({"count": -1}, "count is -1"), ({"target": "\ud800"}, "surrogate"),
        ({"task": "singing"}, "'singing' is none of dip-r1, perc"), ({"task": "ocr"}, "no 'transcript'"),
        ({"labels": []}, "labels: write a line for each class"), ({"task": "grounding"}, "one box"),
        ({"target": "a<|image_pad|>"}, "special token"), ({"task": "counting"}, "no 'points'"),
        ({"task": "ocr", "transcript": ["a"]}, "a text is e"),
        ({"task": "counting", "points": [[1, 2, 3, 4]]}, "points, row 1")]],
], ids=lambda text: ascii(text[-40:]))
def test_a_malformed_line_is_named_with_its_number_and_what_is_wrong(tmp_path, line, said):
    path = write(tmp_path / "d.jsonl", line_of(), "", line.encode("latin-1"))
    refused(f"d.jsonl, line 3: .*{said}", dipr1.load_records, path)


def test_a_line_ends_at_a_line_feed_may_hold_any_character_and_a_box_may_overhang_by_a_pixel(tmp_path):
    line = line_of(target="a\u2028b\x85c e\u0301", boxes=[[-1, 2, 51, 50], [0, 0, 1, 1]])
    text = json.dumps(line, ensure_ascii=False)
    first, second = dipr1.load_records(write(tmp_path / "d.jsonl", f"\ufeff{text}\r\n \r\n{text}"))
    assert first["target"] == second["target"] == "a\u2028b\x85c e\u0301" and len(first["ignore"]) == 0
    assert first["truth"].tolist() == [[0, 2, 50, 50], [0, 0, 1, 1]]
    assert first["path"] == str(tmp_path / "x.png")
    refused("gone: No such file", read_lines, tmp_path / "gone")


def test_images_are_looked_at_before_training_and_one_that_fails_later_ends_it_with_a_line(tiny, tmp_path):
    """A header says how large an image is; that it is cut short is found when it is read."""
    lines, encoder = read_lines(tiny[1]), load(tiny)[1]
    whole = Path(lines[1]["image"]).read_bytes()
    def records(content, **fields):
        line = lines[1] | {"image": str(write(tmp_path / "b.png", content))} | fields
        return dipr1.load_records(write(tmp_path / "d.jsonl", *lines, line))
    for content, fields, said in (
            (b"", {}, "b.png: cannot identify"), (b"", {"image": "gone.png"}, "gone.png: No such file"),
            (whole, {"width": 80}, r"b.png: it has \(168, 84\) pixels, but .* says \(80, 84\)")):
        refused(said, dipr1.check_images, records(content, **fields))
    turned = records(whole, width=84, height=168)
    dipr1.check_images(turned)  # a camera may have
    refused("b.png: it has .168, 84. pixels.*Repair it", list, dipr1.read_ahead(encoder, turned, [[0], [6]]))
    cut = records(whole[:-400])
    dipr1.check_images(cut)
    refused("b.png: .*truncated.*--resume", list, dipr1.read_ahead(encoder, cut, [[0, 1], [2, 6]]))
    refused("b.png: .*truncated.*--resume", main, *training(tiny, tmp_path, "--data", tmp_path / "d.jsonl"))


def step_config(**options):
    small = dict(prompts_per_step=4, group_size=3, max_new_tokens=12, tokens_per_forward=1, lr=1e-4)
    return Config(**{**small, "gradient_checkpointing": False, **options})


def rewards_by_index(zero_odd=False):
    """Random rewards, a function of the prompt; all equal for odd prompts if so asked."""
    def rewards(group, recall_weight):
        drawn = np.random.default_rng(group.prompt.index).random((len(group.completions), 3))
        return torch.from_numpy(np.full_like(drawn, 0.5) if zero_odd and group.prompt.index % 2 else drawn)
    return rewards


def three_steps(tiny, rank, world, zero_odd=False, **options):
    """Weights after three GRPO steps on four prompts, of which this rank takes every world-th. A rank whose
    prompts are the odd ones has zero advantage throughout where `zero_odd`."""
    cfg, (policy, encoder, prompts) = step_config(**options), load(tiny, **options)
    reference, parallel = load(tiny)[0].eval() if cfg.beta else None, dipr1.parallel(policy)
    optimizer = dipr1.make_optimizer(parallel)
    with replaced(group_rewards=rewards_by_index(zero_odd)):
        for step in range(3):
            dipr1.grpo_step(parallel, reference, optimizer, encoder, prompts[rank:4:world], cfg, step, cfg.lr)
    return {name: p.detach().clone() for name, p in policy.named_parameters()}


def worker(rank, tiny, folder):
    """One of two processes: updates with loss = factor * mean log p + term, then the scenarios."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    policy, _, prompts = load(tiny)
    optimizer = dipr1.make_optimizer(parallel := dipr1.parallel(policy))
    one, other = (1.0, INF if rank else 0.0), (NAN if rank else 1.0, 0.0)
    for (factor, term), skipped in ((one, True), (other, True), ((1.0, 0.0), False)):
        before = copy.deepcopy(policy.state_dict())
        with replaced(grpo_loss=lambda logp, *_: (logp.mean() * factor + term, {"kl": 0.0})):
            metrics = dipr1.update(parallel, optimizer, [random_group(prompts[0])], Config(), 1e-3)
        moved = not all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())
        assert metrics["skipped"] == skipped != moved, "both skip"
    torch.save([three_steps(tiny, rank, 2, **scenario) for scenario in SCENARIOS], f"{folder}/rank-{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_end_with_the_weights_of_one(tiny, tmp_path):
    """Also where one rank's groups all have zero advantage, with a frozen tower, with two updates a rollout
    and gradient checkpointing. And a loss that is not finite on one of them is skipped by both."""
    torch.multiprocessing.spawn(worker, (tiny, tmp_path), nprocs=2)
    two = [torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1)]
    start = dict(load(tiny)[0].named_parameters())
    for number, scenario in enumerate(SCENARIOS):
        one = three_steps(tiny, 0, 1, **scenario)
        moved = max((one[name] - start[name]).abs().max().item() for name in one)
        assert moved > 2e-4, "three steps at 1e-4 should have moved something"
        for name in one:
            assert torch.equal(two[0][number][name], two[1][number][name]), (scenario, name)
            assert torch.allclose(one[name], two[0][number][name], atol=1e-5, rtol=0), (scenario, name)
        frozen = all(torch.equal(one[name], start[name]) for name in one if ".visual." in name)
        assert frozen == bool(scenario.get("freeze_vision"))


def test_sft_has_the_gradient_of_the_mean_log_likelihood_of_the_truth(tiny):
    """Of each image's mean over its tokens, averaged over images."""
    policy, encoder, prompts = load(tiny)
    naive, prompts, kept = plain(policy), prompts[:4], {}
    keep = lambda: kept.update({name: p.grad.clone() for name, p in policy.named_parameters()})
    optimizer = SimpleNamespace(param_groups=[{}], step=keep)
    cfg = step_config(tokens_per_forward=500)
    metrics, _ = dipr1.sft_step(policy, optimizer, encoder, prompts, cfg, 1e-3)
    logps = [plain_logprobs(naive, Group(prompt, [encoder.target(prompt)])) for prompt in prompts]
    (-sum(logp.mean() for logp in logps) / 4).backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in naive.parameters()))
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4) and norm > 1, "clipping should be seen too"
    assert metrics["nll"] == pytest.approx(-sum(logp.mean().item() for logp in logps) / 4, abs=1e-5)
    for name, p in naive.named_parameters():
        assert torch.allclose(kept[name] * norm, p.grad, atol=1e-4 * norm), name


def test_a_forward_holds_as_many_tokens_as_allowed_and_not_more():
    rng = np.random.default_rng(0)
    groups = [SimpleNamespace(prompt=SimpleNamespace(ids=range(rng.integers(50, 300))), n_tokens=int(n))
              for n in rng.integers(1, 400, 40)]
    length = lambda group: len(group.prompt.ids) + group.n_tokens
    for budget in (1, 500, 2000, 10**6):
        lists = dipr1.forwards(groups, budget)
        assert list(itertools.chain(*lists)) == groups
        for together, after in itertools.zip_longest(lists, lists[1:]):
            assert len(together) == 1 or sum(map(length, together)) <= budget
            assert not after or sum(map(length, [*together, after[0]])) > budget


def test_a_step_makes_likelier_what_earned_more_and_runs_tower_and_layers_no_more_often_than_needed(tiny):
    """Rollout, then reference and policy for each of three groups; gradient checkpointing, which is the
    default, runs the policy's layers again in the backward, and frozen features are computed once."""
    for options, tower, decoder, of_sft in (
            (dict(gradient_checkpointing=True), 7 + 3, 1 + 3 + 6, 3 + 3), (dict(), 7, 7, 3),
            (dict(freeze_vision=True, gradient_checkpointing=True), 1, 1 + 3 + 6, 3)):
        policy, encoder, prompts = load(tiny, **options)
        cfg, calls, prompts = step_config(max_new_tokens=1, **options), [], prompts[:3]
        reference = copy.deepcopy(policy).eval()
        for model in (policy.model.model, reference.model.model):
            model.visual.blocks[0].mlp.register_forward_pre_hook(lambda *_: calls.append("tower"))
            model.language_model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append("decoder"))
        optimizer = dipr1.make_optimizer(policy)
        with replaced(group_rewards=rewards_by_index()):
            _, groups = dipr1.grpo_step(policy, reference, optimizer, encoder, prompts, cfg, 0, 1e-3)
        assert (calls.count("tower"), calls.count("decoder")) == (tower, decoder), options
        for group in groups:  # every completion is a token long
            earned = dipr1.total_reward(rewards_by_index()(group, 0), cfg)
            assert ((policy([group])[0] - group.rollout_logp) * (earned - earned.mean())).sum() > 0
        calls.clear()
        dipr1.sft_step(policy, optimizer, encoder, prompts, cfg, 1e-3)
        assert calls.count("tower") == of_sft, "recomputation does not run a frozen tower again"


def test_ten_skipped_updates_in_a_row_stop_the_run_and_ten_steps_of_equal_rewards_are_mentioned_once(
        tmp_path, capsys):
    log, bar = dipr1.Log(tmp_path, 0), tqdm(disable=True)
    metrics = {"loss": NAN, "grad_norm": INF, "skipped": 1.0, "frac_zero_std": 1.0}
    for step in range(30):  # rewards are equal in steps 2 to 11 and, which is not mentioned again, 16 to 25
        now = {"skipped": float(step % 10 > 0), "frac_zero_std": float(step not in (1, 15))}
        log.write("grpo", step, metrics | now, bar)
        assert capsys.readouterr().out.count("needs --sft_steps first") == (step == 11), step
    said = "grpo step 30: ten updates in a row not finite .loss nan, .*inf"
    refused(said, log.write, "grpo", 30, metrics, bar)
    written = [json.loads(line, parse_constant=pytest.fail) for line in open(tmp_path / "metrics.jsonl")]
    assert len(written) == 31 and written[0]["loss"] is None, "NaN is not JSON"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_optimizer_is_torchs_adamw_on_fp32_masters(monkeypatch, dtype):
    """Steps below bf16's resolution must add up: 14 bytes a weight. No gradient is kept twice."""
    weight = torch.nn.Parameter(torch.linspace(0.5, 1, 1000).to(dtype))
    exact, before = torch.nn.Parameter(weight.detach().float()), weight.detach().clone()
    ours = dipr1.MasterAdamW([weight], lr=1e-5, weight_decay=0.1)
    theirs, step = torch.optim.AdamW([exact], lr=1e-5, weight_decay=0.1), torch.optim.AdamW.step
    def handed_over(self):
        assert self is theirs or weight.grad is None
        return step(self)
    monkeypatch.setattr(torch.optim.AdamW, "step", handed_over)
    for number in range(500):
        weight.grad = (1.5 + torch.sin(torch.arange(1000.0) + number)).to(dtype)
        exact.grad = weight.grad.float()
        ours.step()
        theirs.step()
    assert torch.allclose(ours.masters[0], exact, atol=1e-7)
    assert torch.equal(weight, ours.masters[0].to(dtype)) and (weight != before).float().mean() > 0.9
    assert weight.grad is ours.masters[0].grad is None
    moments = [t for state in ours.state.values() for t in state.values() if t.numel() > 1]
    size = sum(t.element_size() for t in [weight, *ours.masters, *moments])
    assert size == 14 or dtype is torch.float32


# ------------------------------------------------------------------------------------------------------------
# Evaluation: every figure against a slow, independent way of computing it


def random_detections(rng, n=200):
    """(pred, truth, ignore) of n images: some empty, some crowded, answers jittered, doubled, invented."""
    def some(most, size):
        corner = rng.uniform(0, 80, (rng.integers(0, most), 2))
        return np.hstack([corner, corner + rng.uniform(5, size, corner.shape)])
    images = []
    for _ in range(n):
        truth, ignore = some(6, 40), some(3, 50)
        truth = np.vstack([truth, truth[1:3] + rng.normal(0, 2, truth[1:3].shape)])  # behind one another
        pred = rng.permutation(np.vstack([truth, truth[:2], some(3, 40), ignore[:1]]))[: rng.integers(0, 9)]
        pred = (pred + rng.normal(0, rng.choice([0.3, 3]), pred.shape)).clip(0, 140)
        images.append((pred[(pred[:, 2:] > pred[:, :2]).all(axis=1)], truth, ignore))
    return images


def scored(images, targets=itertools.repeat("person")):
    """The figures of (pred, truth, ignore) images, of which each is asked for its target."""
    records = [{"task": "dip-r1", "target": target, "truth": truth, "ignore": ignore}
               for (_, truth, ignore), target in zip(images, targets)]
    return dipr1.figures_of(records, [{"boxes": pred} for pred, *_ in images])


def slow_counts(pred, truth, ignore, threshold):
    """-> (pairs of `match_boxes`, which has a test of its own, predictions and truths that count)."""
    pairs = list(zip(*dipr1.match_boxes(pred, truth, threshold)[:2]))
    excused = lambda box: (dipr1.box_iou([box], ignore, of_first=True) > 0.5).any()
    counting = [sum(k in [pair[side] for pair in pairs] or not excused(box) for k, box in enumerate(boxes))
                for side, boxes in enumerate((pred, truth))]
    return pairs, *counting


def slow_figures(images):
    """The definitions of the README, box by box."""
    tp = n_pred = n_truth = 0
    jaccard, errors, hidden_found, mean = [], [], [], lambda values: sum(values) / len(values)
    for pred, truth, ignore in images:
        pairs, counted, _ = slow_counts(pred, truth, ignore, 0.5)
        tp, n_pred, n_truth = tp + len(pairs), n_pred + counted, n_truth + len(truth)
        errors.append(abs(counted - len(truth)))
        hidden = [sum(row > 0.2) > 1 for row in dipr1.box_iou(truth, truth)]  # by more than itself
        hidden_found += [t in {t for _, t in pairs} for t, is_hidden in enumerate(hidden) if is_hidden]
        pairs, m, n = slow_counts(pred, truth, ignore, np.nextafter(0.5, 1))
        jaccard += [len(pairs) / (m + n - len(pairs))] if m + n else []
    p, r = tp / n_pred, tp / n_truth
    return {"precision": p, "recall": r, "f1": 2 * p * r / (p + r), "jaccard": mean(jaccard),
            "count_mae": mean(errors), "crowded_recall": mean(hidden_found),
            "truth_boxes_per_image": n_truth / len(images),
            "boxes_per_image": mean([len(pred) for pred, *_ in images])}


def slow_average_precision(images, threshold):
    """COCO's rule, detection by detection, and the interpolated precision by looking at every point."""
    hits, n_truth = [], sum(len(truth) for _, truth, _ in images)
    for pred, truth, ignore in images:
        taken = set()
        for box in pred[:100]:
            overlaps = enumerate(dipr1.box_iou([box], truth)[0])
            iou, k = max(((iou, k) for k, iou in overlaps if k not in taken), default=(0, None))
            if iou >= threshold:
                taken.add(k)
                hits.append(True)
            elif not (dipr1.box_iou([box], ignore, of_first=True) >= threshold).any():
                hits.append(False)
    points = [(sum(hits[:k]) / n_truth, sum(hits[:k]) / k) for k in range(1, len(hits) + 1)]
    return sum(max((p for r, p in points if r >= level), default=0) for level in np.linspace(0, 1, 101)) / 101


def test_every_figure_equals_its_definition_on_200_images_and_the_jaccard_index_is_crowdhumans():
    images = random_detections(np.random.default_rng(0))
    figures, slow = scored(images), slow_figures(images)
    ap = lambda images: np.mean([slow_average_precision(images, t) for t in np.linspace(0.5, 0.95, 10)])
    slow |= {"ap50": slow_average_precision(images, 0.5), "ap70": slow_average_precision(images, 0.7),
             "ap": ap(images)}
    assert figures == pytest.approx(slow, abs=1e-9) and min(slow.values()) > 0.1, "0 tests nothing"
    nothing = scored([(boxes(), boxes(), boxes())])
    assert nothing == {"count_mae": 0, "boxes_per_image": 0, "truth_boxes_per_image": 0}, "no shares"
    names, nowhere = ("bus", "car", "dog"), (boxes([1, 1, 9, 9]), boxes(), boxes())
    targets = np.random.default_rng(1).choice(names, len(images)).tolist()
    aps = [ap([image for image, t in zip(images, targets) if t == name]) for name in names]
    assert scored([*images, nowhere], [*targets, "cat"])["ap"] == pytest.approx(np.mean(aps), abs=1e-9)
    images[0] = (np.vstack([images[0][0]] * 90), *images[0][1:])  # more than the 100 that COCO looks at
    assert scored(images)["ap50"] == pytest.approx(slow_average_precision(images, 0.5), abs=1e-9)
    # Two pairs of exactly .5 add up to more than the one of .9, which alone counts for CrowdHuman's index.
    pred, truth = boxes([0, 0, 90, 9], [50, 0, 100, 9]), boxes([0, 0, 45, 9], [0, 0, 100, 9])
    assert scored([(pred, truth, boxes())])["jaccard"] == 1 / 3

@needs_real
def test_a_real_coco_file_has_the_map_that_the_toolkit_gives_with_equal_scores(tmp_path):
    """A question for each of 100 images and 80 categories; answers come in order of their score."""
    data, found = (json.loads((REAL / f"coco100/instances_val2014_{name}.json").read_text())
                   for name in ("100", "fakebbox100_results"))
    table = {"boxes": {}, "ignore": {}, "found": {}}
    for entry in data["annotations"] + sorted(found, key=lambda entry: -entry["score"]):
        kind = "found" if "score" in entry else "ignore" if entry["iscrowd"] else "boxes"
        (x, y, w, h), key = entry["bbox"], (entry["image_id"], entry["category_id"])
        table[kind].setdefault(key, []).append([x, y, x + w, y + h])
    lines, answers = [], []
    images = sorted(data["images"], key=lambda image: image["id"])  # in the toolkit's order
    for image, category in itertools.product(images, data["categories"]):
        key, about = (image["id"], category["id"]), {"image": image["file_name"], "target": category["name"]}
        truth = {kind: table[kind].get(key, []) for kind in ("boxes", "ignore")}
        lines.append(line_of(**about, width=image["width"], height=image["height"], **truth))
        answers.append(about | {"boxes": table["found"].get(key, [])})
    records = dipr1.load_records(write(tmp_path / "d.jsonl", *lines))
    predictions = dipr1.load_predictions(write(tmp_path / "p.jsonl", *answers[::-1]), records)
    assert round(dipr1.figures_of(records, predictions)["ap"], 4) == 0.5145


def evaluation_of(folder, *flags):
    """What `dipr1.py --eval` or `--predictions` writes to eval.json."""
    main(*flags, "--output_dir", folder)
    return json.loads((Path(folder) / "eval.json").read_text())


def test_sft_learns_by_heart_and_evaluation_and_its_predictions_file_agree_on_it(tiny, tmp_path):
    policy, encoder, prompts = load(tiny)
    records, optimizer = dipr1.load_records(tiny[1]), dipr1.make_optimizer(policy)
    cfg = step_config(max_new_tokens=80, samples=3, tokens_per_forward=2000)
    greedy = dataclasses.replace(cfg, samples=0)
    before = dipr1.evaluate(policy, encoder, records, greedy, tmp_path / "before")
    assert before["recall"] == 0 and "precision" not in before
    for _ in range(60):
        metrics, _ = dipr1.sft_step(policy, optimizer, encoder, prompts, cfg, 3e-3)
    figures = dipr1.evaluate(policy, encoder, records, cfg, tmp_path, pictures=3)
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {f"00000{k}.png" for k in range(3)}
    assert figures["recall"] == figures["precision"] == figures["format_rate"] == 1 and metrics["nll"] < 0.1
    written = tmp_path / "predictions.jsonl"
    samples = [sample for line in read_lines(written) for sample in line["samples"]]
    rates = np.mean([sample["rewards"] for sample in samples], axis=0).tolist()
    assert len(samples) == 18 and figures["sampled_f1"] > 0.5 and figures["look_reward"] >= 0
    assert rates == [figures["sampled_" + x] for x in ("format_rate", "look_reward", "accuracy_reward")]
    alone = dipr1.evaluate(policy, encoder, records, greedy, tmp_path / "greedy")
    assert alone["recall"] == 1 and not {"look_reward", "sampled_f1"} & set(alone)
    again = evaluation_of(tmp_path, "--predictions", written, "--data", tiny[1])
    assert again["images"] == 6 and again["ap"] == 1 and "format_rate" not in again  # nor are rewards read
    assert all(again[name] == value for name, value in figures.items() if name in again)


def test_predictions_of_another_tool_need_an_image_and_boxes_alone(tmp_path, capsys):
    """In any order. Where a line is wrong, the error names file, line and value."""
    data = [line_of(image=f"{n}.png", target="car", boxes=[[n, 1, 20, 20], [30, 30, 40, 40]])
            for n in range(4)]
    data += [data[3] | {"target": "bus", "boxes": [[1, 2, 30, 40]]}, data[2]]  # one is asked twice
    write(tmp_path / "d.jsonl", *data)
    lines = [{"image": line["image"], "boxes": line["boxes"]} for line in data[:3]]
    lines += [{name: line[name] for name in ("image", "target", "boxes")} for line in data[:2:-1]]
    def score(*entries):
        path = write(tmp_path / "p.jsonl", *entries)
        return evaluation_of(tmp_path, "--predictions", path, "--data", tmp_path / "d.jsonl")
    figures = score(*lines)
    assert figures["f1"] == figures["jaccard"] == 1 and not {"format_rate", "sampled_f1"} & set(figures)
    assert score(*lines[1:])["recall"] == 9 / 11 and "no line for 1 of 6" in capsys.readouterr().out
    lines[0] = lines[0] | {"boxes": [], "scores": [0.3]}  # other fields are not read
    assert score(*lines)["recall"] == 9 / 11
    fine = lines[0] | {"boxes": [[-2.5, 1, 53, 20.5]]}  # some overhang
    empty = lines[0] | {"boxes": [[3, 4, 3, 9]]}  # as an inverted box is kept: in no region, and wrong
    assert score(fine, *lines[1:])["boxes_per_image"] == score(empty, *lines[1:])["boxes_per_image"] == 10 / 6
    assert scored([(boxes([3, 4, 3, 9]), boxes(), boxes([0, 0, 20, 20]))])["f1"] == 0
    for line, said in (
            (lines[1], "0 questions .* 1.png"), (fine | {"target": "dog"}, "0 questions"),
            (fine | {"image": "9.png"}, "0 questions"), (fine | {"image": "3.png"}, "2 questions"),
            ({"image": "0.png"}, "no 'boxes'"), ({"boxes": []}, "no 'image'"),
            (fine | {"boxes": [[1, 2, 3, 4, 0.9]]}, r"boxes, row 1: \[1, 2, 3, 4, 0.9\] is not 4"),
            (fine | {"boxes": [[1, 2, 3, 4], [9, 9, 5, 11]]}, r"row 2: \[9, 9, 5, 11\] does not have x1"),
            (fine | {"boxes": [[9, 9, 500, 20]]}, "is outside the 50 x 50 pixels of the image"),
            (fine | {"boxes": [[0.1, 0.2, 0.5, 1], [0, 0, 1, 1]]}, "fractions, where the 50 x 50 pixels")):
        refused(f"p.jsonl, line {1 + (line is lines[1])}: .*{said}", score, line, *lines[1:])


@pytest.mark.parametrize("method, samples", [("dip-r1", 2), ("perception-r1", 0), ("grounding", 1),
                                             ("counting", 2), ("ocr", 0)])
def test_a_picture_is_answered_and_drawn(taught, tmp_path, monkeypatch, capsys, method, samples):
    """One that nobody annotated, or all of a folder; the model of these tests knows one template."""
    monkeypatch.chdir(tmp_path)
    for name in ("b.JPG", "a.png"):
        Image.new("RGB", (112, 112), (90, 120, 150)).save(write(tmp_path / "photos" / name))
    write(tmp_path / "photos/notes.txt", "no picture")
    flags = ["--model", taught[0], "--method", method, "--target", "the man in red", "--samples", samples]
    main("--image", "photos", *flags, "--max_new_tokens", 40)
    said, lines = capsys.readouterr().out, read_lines(tmp_path / "runs/eval/predictions.jsonl")
    assert [line["image"] for line in lines] == ["photos/a.png", "photos/b.JPG"] and "rewards" not in lines[0]
    assert "photos/b.JPG: " in said and "pictures/000001.png" in said and "Written: runs/eval/pred" in said
    if method == "dip-r1":
        thought = dipr1.parse_response(lines[0]["text"]).think or ""
        assert f"{len(lines[0]['boxes'])} found. {thought} " in said
        assert all(0 <= side <= 113 for box in lines[0]["boxes"] for side in box)
    assert len(lines[0]["samples"]) == samples and not any("rewards" in s for s in lines[0]["samples"])
    width = Image.open("runs/eval/pictures/000000.png").width
    assert width == (448 if samples == 0 else 2 * 448 + 8), "with or without the map"
    write(tmp_path / "empty/notes.txt", "")
    for image, said in (("photos/gone.png", "gone.png: No such file"), ("photos/notes.txt", "notes.txt: "),
                        ("empty", "--image empty: no .jpg, .png or .webp")):
        refused(said, main, *flags, "--image", image)
    refused("--target: .*special token", main, *flags, "--image", "photos", "--target", "a <|im_end|>")


def test_an_answer_is_drawn_with_who_was_missed_and_kept_in_pixels_of_the_original(tmp_path):
    """Each in its colour, said in the caption too; what lies in an ignore region is neither."""
    Image.new("RGB", (112, 112)).save(tmp_path / "x.png")
    record = {"path": str(tmp_path / "x.png"), "target": "person", "boxes": CROWD}
    prompt = SimpleNamespace(record=record, task=dipr1.TASKS["dip-r1"], size=(112, 112), truth=boxes(*CROWD),
                             ignore=boxes([100, 0, 112, 30]))
    answer = [*CROWD[:3], [80, 80, 95, 110], [102, 2, 110, 20]]
    group = Group(prompt, [], texts=[completion(look="[[2, 90, 9, 99]]", answer=answer)])
    sheet = dipr1.draw_picture(group, tmp_path / "p.png", "start:")
    assert (tmp_path / "p.png").exists() and sheet.size == (448, 448 + 24)
    at = lambda box: sheet.getpixel((4 * box[0] + 1, 4 * box[1] + 24 + 1))
    assert [at(box) for box in CROWD] == [dipr1.ORANGE] * 3 + [dipr1.BLUE]
    assert at([80, 80]) == dipr1.RED and at([2, 90]) == dipr1.GREEN and at([102, 2]) == (0, 0, 0)
    said = dipr1.draw_answer(sheet, group.responses[0], prompt, 1)
    assert said.startswith("3 of 4 found, 1 wrong")
    record |= {"width": 224, "height": 56}
    response = Response("t", None, boxes([10, 20, 30, 40], [90, 90, 10, 95]), True)
    kept = dipr1.as_prediction(response, "text", prompt)  # an inverted box as an empty one
    assert kept == {"text": "text", "boxes": [[20, 10, 60, 20], [180, 45, 180, 47.5]]}
    assert response.answer[1, 2] == 10, "the response itself is as it was"
    assert dipr1.as_prediction(Response("t", None, None, True), "", prompt)["boxes"] == []


def test_mixed_tasks_train_and_are_evaluated_together(tiny, tmp_path):
    lines = []
    for number, line in enumerate(line for line in read_lines(tiny[1]) if line["boxes"]):
        first, points = line["boxes"][:1], [[x, y] for x, y, *_ in line["boxes"]]
        lines += [line, line | {"task": "grounding", "target": "the first", "boxes": first},
                  line | {"task": "counting", "target": "head", "points": points},
                  line | {"task": "ocr", "transcript": f"page {number}"}]
    flags = ["--method", "perception-r1", "--data", write(tmp_path / "all.jsonl", *lines),
             "--max_new_tokens", 16, "--group_size", 3]
    main(*flags, "--model", tiny[0], "--output_dir", tmp_path, "--sft_steps", 2, "--sft_batch", 4,
         "--steps", 2, "--prompts_per_step", 4, "--picture_every", 1)
    metrics, model = lines_of(tmp_path), tmp_path / "checkpoint-000004"
    assert [line["skipped"] for line in metrics] == [0] * 4 and metrics[-1]["reward_look"] == 0
    assert all(line["truth_boxes"] < 4 for line in metrics[2:]), "characters of a page are no boxes"
    figures = evaluation_of(tmp_path / "eval", *flags, "--eval", "--model", model, "--samples", 2)
    assert {"perception-r1 f1", "grounding acc_0.5", "counting count_mae", "ocr edit_distance", "format_rate",
            "sampled_accuracy_reward"} <= set(figures)
    assert len(list((tmp_path / "eval/pictures").iterdir())) == 8
    source = tmp_path / "eval/predictions.jsonl"
    again = evaluation_of(tmp_path / "again", *flags, "--predictions", source)
    assert again == {name: figures[name] for name in again} | {"source": str(source)} and len(again) > 15
    # A line without the truth of its task is refused; a count without points is not trained on.
    *_, counted, page = lines
    silent = write(tmp_path / "d.jsonl", {name: page[name] for name in ("image", "target", "task")})
    refused("d.jsonl, line 1: .*transcript", main, *flags, "--predictions", silent)
    counted["count"] = len(counted.pop("points"))
    flags += ["--data", write(tmp_path / "d.jsonl", counted), "--model", tiny[0]]
    figures = evaluation_of(tmp_path / "count", *flags, "--eval", "--samples", 2)
    assert {"exact_count", "count_mae", "format_rate"} <= set(figures)
    said = "without points: they can be evaluated, not trained on"
    refused(said, main, *flags, "--output_dir", tmp_path / "run")


def test_figures_of_the_other_tasks_by_hand():
    figures = lambda task, *pairs: dipr1.TASKS[task].figures([(*pair, boxes(), "x") for pair in pairs])
    box, points = boxes([0, 0, 10, 10]), lambda n: np.zeros((n, 2))
    pairs = (box, box), (boxes([0, 0, 10, 6]), box), (boxes(), box), (boxes([0, 0, 10, 8]), box)
    assert figures("grounding", *pairs) == {"acc_0.5": 0.75, "mean_iou": pytest.approx(0.6)}
    pairs = (points(3), points(3)), (points(0), points(2)), (points(5), points(4)), (points(0), points(0))
    assert figures("counting", *pairs) == {"exact_count": 0.5, "count_mae": 0.75}
    pairs = ("the cat", "the cat"), ("the the", "the dog"), ("", "x")
    assert figures("ocr", *pairs) == {"edit_distance": pytest.approx((0 + 3 / 7 + 1) / 3)}


# ------------------------------------------------------------------------------------------------------------
# The command line, as a user types it

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def start(*command, before=()):
    """A command of Python in a process of its own, which leads a session so that all of it can be killed."""
    return subprocess.Popen(
        [*before, sys.executable, *map(str, command)], cwd=HERE, env=os.environ | {"PYTHONPATH": str(HERE)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def run(*command, expect=0, **options):
    """Such a command, until it ends -> what it printed."""
    process = start(*command, **options)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == expect, said[-3000:]
    return said


def readme_block(language, part):
    """The first block of code in the README that has this in it."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", (HERE / "README.md").read_text(), re.M | re.S)
    return next(block for block in blocks if part in block)


@pytest.mark.slow
def test_the_readmes_commands_for_your_own_data_work_as_typed_but_smaller(tmp_path):
    script = readme_block("bash", "python data_prep.py synthetic")
    smaller = {"train": 4, "val": 2, "sft_steps": 2, "sft_batch": 2, "steps": 1, "prompts_per_step": 2}
    for flag, number in smaller.items():
        script = re.sub(rf"--{flag} \d+", f"--{flag} {number}", script)
    for before, now in (("000300", "000003"), ("000400", "000004"), ("python ", f"{sys.executable} {HERE}/")):
        assert before in script
        script = script.replace(before, now)
    subprocess.run(["bash", "-ec", script], cwd=tmp_path, check=True)
    folder = tmp_path / "runs/eval"
    assert json.loads((folder / "eval.json").read_text())["images"] == 2
    assert len(lines_of(tmp_path / "runs/mine")) == 3
    assert len(read_lines(folder / "predictions.jsonl")) == 1 and (folder / "pictures/000000.png").exists()


def test_the_readmes_task_trains_as_it_is_written_and_rewards_the_order(tiny, tmp_path):
    script = write(tmp_path / "mytask.py", readme_block("python", "dipr1.TASKS["))
    run(script, *training(tiny, tmp_path, "--method", "queue", "--sft_steps", 1, "--steps", 1))
    assert "reward_accuracy" in lines_of(tmp_path)[1]
    with mock.patch.dict(dipr1.TASKS):
        runpy.run_path(str(script))
        two = TWO.tolist()
        for answer, reward in ((two, 1), (two[::-1], 0), (two[:1], 0.5), ([], 0)):
            assert judged(f"<answer>{answer}</answer>", prompt_of("queue", two[::-1])) == (1, reward)


def training(tiny, folder, *more):
    """The flags of a small run: two supervised steps, four of GRPO, a checkpoint after each."""
    return [str(flag) for flag in (
        "--model", tiny[0], "--data", tiny[1], "--output_dir", folder, "--sft_steps", 2, "--sft_batch", 4,
        "--sft_lr", 1e-3, "--steps", 4, "--prompts_per_step", 4, "--group_size", 3, "--max_new_tokens", 40,
        "--lr", 1e-3, "--save_every", 1, "--keep", 0, "--picture_every", 0, *more)]


def lines_of(folder):
    """metrics.jsonl without what a clock says."""
    lines = read_lines(folder / "metrics.jsonl")
    return [{name: value for name, value in line.items() if "second" not in name} for line in lines]


def test_training_under_torchrun_writes_metrics_pictures_and_a_checkpoint_to_evaluate(tiny, tmp_path):
    flags = ["--steps", 2, "--picture_every", 1, "--save_every", 0]
    run(*TORCHRUN, "dipr1.py", *training(tiny, tmp_path, *flags))
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert [(x["phase"], x["step"]) for x in lines] == [("sft", 1), ("sft", 2), ("grpo", 3), ("grpo", 4)]
    assert all(math.isfinite(value) for line in lines for name, value in line.items() if name != "phase")
    readme = (HERE / "README.md").read_text()
    assert not {name for name in lines[0] | lines[2] if f"`{name}`" not in readme}, "undefined metrics"
    assert all(Image.open(tmp_path / f"pictures/step-{n:06d}.png").size[0] > 400 for n in (3, 4))
    assert sorted(path.name[-1] for path in tmp_path.glob("checkpoint*")) == ["2", "4"]
    checkpoint = tmp_path / "checkpoint-000004"
    assert all(torch.load(checkpoint / f"optimizer-{n}.pt", weights_only=True)["masters"] for n in (0, 1))
    flags = ["--eval", "--model", checkpoint, "--data", tiny[1], "--max_new_tokens", 12, "--samples", 2]
    figures = evaluation_of(tmp_path / "one", *flags)
    shown = run(*TORCHRUN, "dipr1.py", *flags, "--output_dir", tmp_path / "two")
    assert figures == json.loads((tmp_path / "two/eval.json").read_text()) and shown.count("jaccard") == 1
    one, two = ((tmp_path / folder / "predictions.jsonl").read_text() for folder in ("one", "two"))
    assert one == two and one.count("\n") == 6  # shared out over ranks, and in order again


@pytest.mark.parametrize("launcher", [[], TORCHRUN], ids=["python", "torchrun"])
def test_the_demo_end_to_end_in_small(tmp_path, launcher):
    """The trap: two processes draw the scenes, and one replaces the file that the other reads."""
    small = write(tmp_path / "small.py", f"""if __name__ == "__main__":
    import sys
    sys.path.insert(0, {str(HERE)!r})
    import data_prep, dipr1
    dipr1.SCENES, synthetic = {{"sparse": (12, 2), "dense": (6, 4), "night": (0, 2)}}, data_prep.synthetic
    dipr1.PRETRAINING = dict(sft_steps=2, steps=0)
    data_prep.synthetic = lambda *args, **more: (print("scenes are drawn"), synthetic(*args, **more))
    dipr1.main()""")
    demo = small, "--demo", "--output_dir", tmp_path
    shown = run(*launcher, *demo, "--seed", 3, "--sft_steps", 3, "--steps", 1, "--prompts_per_step", 2,
                "--group_size", 2, "--picture_every", 1, "--max_new_tokens", 16)
    assert shown.count("scenes are drawn") == 3 and shown.count("images evaluated") == 3
    assert shown.index("sparse: f1") < shown.index("3 steps are done") < shown.index("1 steps are done")
    assert "Traceback" not in shown and "UserWarning" not in shown
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["seed"] == 3 and summary["seconds"] > 0
    names = {"recall", "f1", "jaccard", "format_rate", "look_reward", "sampled_f1", "sampled_look_reward"}
    for name, steps in {"start": 2, "sft": 3, "dip-r1": 1}.items():
        assert all(names <= set(summary[name][crowd]) for crowd in ("sparse", "dense", "night"))
        assert len(lines_of(tmp_path / name)) == steps
    assert list((tmp_path / "dip-r1/pictures").iterdir())
    assert Image.open(tmp_path / "crowd.png").height == 3 * 472
    again = run(*demo, expect=1)
    assert "holds a run already" in again and "are drawn" not in again  # nothing is overwritten


def test_what_cannot_run_is_said_in_a_line_with_the_remedy_before_anything_is_written(
        tiny, tmp_path, capsys, monkeypatch):
    out, flags = tmp_path / "out", training(tiny, tmp_path / "out")
    def refused_at_once(said, *more):
        refused(said, main, *flags, *more)
        assert not out.exists()
    message = run("dipr1.py", *flags, "--data", tmp_path / "no.jsonl", expect=1)
    assert "data_prep.py --help" in message and "--demo" in message and "Traceback" not in message
    for flag, value in (("group_size", 1), ("temperature", 0), ("lr", "nan"), ("recall_weight", 1.5)):
        refused_at_once(f"--{flag} {value}.*: at least ", f"--{flag}", value)
    refused_at_once("--steps 0 and --sft_steps 0 train nothing", "--steps", 0, "--sft_steps", 0)
    refused_at_once("--demo compares SFT and dip-r1: neither", "--demo", "--steps", 0)
    with mock.patch.object(dist, "get_world_size", lambda: 3):
        refused_at_once("--prompts_per_step 4 cannot be shared out", "--sft_steps", 0)
    lost = write(tmp_path / "d.jsonl", *(line_of(image=f"{number}.png") for number in range(6)))
    refused_at_once("0.png: No such file or directory", "--data", lost)
    refused_at_once("--method counts is none of dip-r1, perc", "--method", "counts")
    config, file = (tiny[0] / "config.json").read_text(), tiny[0] / "model.safetensors"
    lacking = {n: w for n, w in load_file(file).items() if "s.1.self_attn.o" not in n}
    newer = re.sub('"type": ?"BPE"', '"type":"Better"', (tiny[0] / "tokenizer.json").read_text())
    quantised = json.loads(config) | {"quantization_config": {"quant_method": "awq", "bits": 4}}
    for said, name, content in (
            ("lacks 1 w", file.name, save(lacking)), ("safetensors: ", file.name, file.read_bytes()[:-9]),
            ("", "config.json", b"{}"), ("", "tokenizer.json", b""), ("", "tokenizer.json", newer),
            ("it is quantised", "config.json", quantised),
            ("it is a qwen2_vl", "config.json", config.replace('"qwen2_5_vl"', '"qwen2_vl"'))):
        model = shutil.copytree(tiny[0], tmp_path / "model", dirs_exist_ok=True)
        write(model / name, content)
        refused_at_once(f"{model}.*{said}", "--model", model)
    for path in model.glob("tokenizer*"):
        path.unlink()
    shutil.copy(tiny[0] / "config.json", model)
    refused_at_once("its tokenizer is missing", "--model", model)  # transformers would make an empty one
    refused_at_once("cannot load --model .*/no, which is no folder: names on", "--model", model / "no")
    with replaced(snapshot_download=mock.Mock(side_effect=OSError("offline\nnow"))):
        refused_at_once("cannot load --model a/b, which is no folder: offline now", "--model", "a/b")
    refused("File exists: .*config.json", main, *flags, "--output_dir", model / "config.json")
    main(*flags, "--sft_steps", 3, "--steps", 0)
    assert "Written: " in capsys.readouterr().out and (out / "checkpoint-000003").exists()
    refused("holds a run already: --resume it", main, *flags)
    # Every process has a GPU of its own, and the demo needs none.
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(is_available=lambda: True, device_count=lambda: 1))
    monkeypatch.setenv("LOCAL_RANK", "1")
    refused("no GPU for process 2: torchrun --nproc_per_node 1", dipr1.join_processes, Config())
    assert (dipr1.device_of(Config()), dipr1.device_of(Config(demo=True))) == ("cuda", "cpu")
    dipr1.join_processes(Config(demo=True))


# ------------------------------------------------------------------------------------------------------------
# Kill it, and go on


@pytest.fixture(scope="session")
def taught(tiny, tmp_path_factory):
    """The tiny model and its data, after some lessons: its answers earn rewards, which differ. The folder is
    as the hub has it: a chat template, merges, an index of shards, JSON not as transformers writes it."""
    dipr1.join_processes(Config())
    policy, encoder, prompts = load(tiny)
    optimizer, folder = dipr1.make_optimizer(policy), tmp_path_factory.mktemp("taught")
    for _ in range(20):
        dipr1.sft_step(policy, optimizer, encoder, prompts, step_config(tokens_per_forward=2000), 3e-3)
    dipr1.save_model(policy.model, tiny[0], folder, 99 * 28 * 28)
    for path in folder.glob("*.json"):
        write(path, json.loads(path.read_text()))
    write(folder / "chat_template.jinja", "{{ }}")
    write(folder / "merges.txt", "a b")
    write(folder / "model.safetensors.index.json", "{}")
    return folder, tiny[1]


@pytest.fixture(scope="session")
def finished(taught, tmp_path_factory):
    """A run that nobody interrupted."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    main(*training(taught, folder))
    assert all(line["reward_std"] > 0 and line["kl"] > 0 for line in lines_of(folder)[4:]), "it should learn"
    return folder


def until(done, finished, folder):
    """A copy of the run as it was after so many steps, but for the metrics of later ones."""
    later = [f"checkpoint-{step:06d}" for step in range(done + 1, 7)]
    return shutil.copytree(finished, folder, ignore=shutil.ignore_patterns(*later))


def assert_same_run(folder, finished):
    a, b = (load_file(run / "checkpoint-000006/model.safetensors") for run in (folder, finished))
    assert all(torch.equal(a[name], b[name]) for name in b) and set(a) == set(b)
    assert lines_of(folder) == lines_of(finished) and len(lines_of(folder)) == 6


@pytest.mark.parametrize("done, torchrun", [(1, False), (2, False), (4, True)])  # warm-up, its end, GRPO
def test_a_resumed_run_ends_bit_for_bit_as_one_never_interrupted(taught, finished, tmp_path, done, torchrun):
    environment = dict(RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT="0")
    with mock.patch.dict(os.environ, environment if torchrun else {}):
        dist.destroy_process_group()
        main(*training(taught, until(done, finished, tmp_path / "run"), "--resume"))
    assert_same_run(tmp_path / "run", finished)


def test_a_checkpoint_is_the_models_folder_with_new_weights_and_without_an_index_of_the_old(taught, finished):
    """Bytes equal, and names of weights, so that it loads wherever the model that was trained does."""
    folders = taught[0], finished / "checkpoint-000006"
    before, now = ({path.name: path for path in folder.iterdir()} for folder in folders)
    assert set(now) - set(before) == {"dipr1.json", "optimizer-0.pt"}
    assert set(before) - set(now) == {"model.safetensors.index.json"}
    settings = json.loads(before["preprocessor_config.json"].read_text())
    assert json.loads(now["preprocessor_config.json"].read_text()) == settings | {
        "max_pixels": Config().max_pixels} != settings
    for name in set(now) & set(before) - {"model.safetensors", "preprocessor_config.json"}:
        assert now[name].read_bytes() == before[name].read_bytes(), name
    weights = [load_file(files["model.safetensors"]) for files in (before, now)]
    assert set(weights[0]) == set(weights[1]) and "visual.patch_embed.proj.weight" in weights[0]
    policy, encoder = dipr1.setup(Config(model=str(folders[1]), max_pixels=56 * 56))
    assert encoder.image_processor.size["longest_edge"] == 56 * 56  # the flag is heeded, too


def test_resuming_names_a_file_that_it_cannot_read_and_touches_nothing(taught, finished, tmp_path):
    run = until(4, finished, tmp_path / "run")
    last, before = run / "checkpoint-000004", sorted(run.rglob("*"))
    metrics = (run / "metrics.jsonl").read_bytes()
    for name in ("optimizer-0.pt", "model.safetensors", "dipr1.json"):
        whole = (last / name).read_bytes()
        for content in (None, b"", whole[: len(whole) // 2], whole[:-3]):
            (last / name).unlink() if content is None else write(last / name, content)
            lost = content is None and "safetensors" in name  # transformers names the folder
            named = "checkpoint-000004" + ("" if lost else f"/{name}")
            refused(named, main, *training(taught, run, "--resume"))
            write(last / name, whole)
    assert sorted(run.rglob("*")) == before and (run / "metrics.jsonl").read_bytes() == metrics
    (run / "metrics.jsonl").unlink()  # is begun anew
    main(*training(taught, run, "--resume"))
    assert [line["step"] for line in lines_of(run)] == [5, 6] and lines_of(run) == lines_of(finished)[4:]


def test_resuming_says_what_it_does_and_another_run_is_refused(taught, finished, tmp_path, capsys):
    run, same = until(6, finished, tmp_path / "run"), training(taught, tmp_path / "run", "--resume")
    link, data = tmp_path / "link", write(tmp_path / "d.jsonl", taught[1].read_bytes())
    link.symlink_to(taught[0])
    main(*same, "--model", f"{link}/", "--data", data)  # other names of the same
    said = capsys.readouterr().out
    assert f"going on from {run}/checkpoint-000006" in said and "6 steps are done. Written: " in said
    for flag, value, was in (("lr", "1e-4", "0.001 and is 0.0001"), ("steps", 6, "4 and is 6"),
                             ("data", write(data, *read_lines(data), "", ""), "")):
        name = "data_sha256" if flag == "data" else flag
        refused(f"its {name} was {was}.*now.*--model {run}/checkpoint-000006 --output_dir NEW",
                main, *same, f"--{flag}", value)
    with mock.patch.object(dist, "get_world_size", lambda: 2):
        refused("its processes was 1 and is 2", dipr1.find_checkpoint, dipr1.parse_flags(same))
    with replaced(over_ranks=lambda values, how: [values[0] + (how == "MAX")]):  # another node sees more
        refused("not every process sees the same checkpoints", dipr1.train, dipr1.parse_flags(same))
    main(*training(taught, tmp_path / "new", "--resume", "--steps", 0))
    assert "has no checkpoint: beginning with step 1" in capsys.readouterr().out


@pytest.mark.parametrize("installed", [True, False])
def test_tensorboard_shows_the_same_figures_where_it_is_installed(taught, tmp_path, monkeypatch, installed):
    board = mock.MagicMock()
    module = SimpleNamespace(SummaryWriter=board) if installed else None  # None: importing it fails
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    main(*training(taught, tmp_path, "--steps", 1, "--picture_every", 1))
    shown = {call.args for call in board().add_scalar.call_args_list}
    lines = {(f"{line['phase']}/{name}", value, line["step"]) for line in read_lines(
        tmp_path / "metrics.jsonl") for name, value in line.items() if name not in ("phase", "step")}
    assert shown == (lines if installed else set())
    pictures = [(call.args[1].shape[2], call.args[2]) for call in board().add_image.call_args_list]
    assert pictures == ([(3, 3)] if installed else []) and (tmp_path / "pictures/step-000003.png").exists()


def test_sigterm_finishes_the_step_and_writes_a_checkpoint_old_ones_go(taught, finished, tmp_path, capsys):
    step = dipr1.grpo_step
    def terminated(*args):
        for _ in (1, 2) if args[-2] == 0 else ():  # in the first step, a scheduler's and torchrun's
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args)
    write(tmp_path / "checkpoint-000137.tmp/model.safetensors", b"of a run killed while it saved")
    with replaced(grpo_step=terminated), pytest.raises(SystemExit) as stop:
        main(*training(taught, tmp_path, "--save_every", 100))
    assert stop.value.code == 128 + signal.SIGTERM and "stopped by SIGTERM" in capsys.readouterr().out
    assert sorted(path.name[-1] for path in tmp_path.glob("check*")) == ["2", "3"]
    assert len(lines_of(tmp_path)) == 3 and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    main(*training(taught, tmp_path, "--resume", "--keep", 1))
    assert_same_run(tmp_path, finished)
    left = sorted(path.name[-1] for path in tmp_path.glob("check*"))
    assert left == ["2", "6"], "old checkpoints go, but the one that ended SFT stays"


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_as_one_that_was_not(taught, finished, tmp_path):
    """SIGKILL at random moments, by preference while a checkpoint is being written."""
    rng = np.random.default_rng(0)
    for number in range(10):
        process = start("dipr1.py", *training(taught, tmp_path, "--resume"))
        while process.poll() is None and not list(tmp_path.glob("*.tmp" if number % 2 else "metrics.jsonl")):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02 if number % 2 else 1.0))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    main(*training(taught, tmp_path, "--resume"))
    assert_same_run(tmp_path, finished)


@pytest.mark.slow
def test_under_torchrun_a_run_that_lost_a_rank_goes_on(taught, tmp_path):
    """SIGKILL to one of two ranks, in GRPO; torchrun starts both again. It keeps its store, and in it stand
    the addresses of the dead: a rank that reads one waits for it forever."""
    whole, hurt = tmp_path / "whole", tmp_path / "hurt"
    run(*TORCHRUN, "dipr1.py", *training(taught, whole))
    process = start(*TORCHRUN, "--max_restarts", 1, "dipr1.py", *training(taught, hurt, "--resume"))
    while not (hurt / "checkpoint-000003").exists() and process.poll() is None:
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said[-3000:]
    assert_same_run(hurt, whole)


@pytest.mark.parametrize("full", ["model.safetensors", "optimizer-0.pt"])
def test_a_full_disk_ends_the_run_with_one_line_and_with_room_it_goes_on(taught, finished, tmp_path, full):
    """The run wants to write checkpoints 4 to 6, and there is room for half of this file of one."""
    folder = until(3, finished, tmp_path / "run")
    blocks = (folder / "checkpoint-000003" / full).stat().st_size // 1024  # of 512 bytes
    quota = ["sh", "-c", f'ulimit -f {blocks}; exec "$@"', "sh"]
    said = run("dipr1.py", *training(taught, folder, "--resume"), before=quota, expect=1)
    assert "Traceback" not in said and "--resume" in said
    assert said.count("could not be written") == said.count("checkpoint-000004 could") == 1
    assert len(lines_of(folder)) == 4
    main(*training(taught, folder, "--resume"))
    assert_same_run(folder, finished)


# ------------------------------------------------------------------------------------------------------------
# With a GPU: pytest -m gpu test_dipr1.py


on_gpu = lambda test: pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU")(test))

@on_gpu
def test_the_captured_step_samples_as_the_eager_one_and_bf16_scores_as_exactly_as_naively(tiny, recwarn):
    policy, encoder, prompts = load(tiny)
    groups = sampled(policy, encoder, prompts, 4, 60)
    assert not [warning for warning in recwarn if "CUDA graph" in str(warning.message)]
    with replaced(captured=lambda step, *inputs: step):
        eager = sampled(policy, encoder, prompts, 4, 60)
    for a, b in zip(groups, eager):
        assert [o.tolist() for o in a.completions] == [o.tolist() for o in b.completions]
        assert torch.allclose(a.rollout_logp, b.rollout_logp, atol=1e-5)
    precise = copy.deepcopy(policy).float()
    with torch.no_grad():
        exact, naive = (torch.cat([plain_logprobs(plain(p), group) for group in groups])
                        for p in (precise, policy))
        ours, rough = torch.cat(precise(groups)), torch.cat(policy(groups))
        assert policy.model.dtype == torch.bfloat16 and torch.allclose(ours, exact, atol=1e-3)
        assert (rough - exact).abs().max() < 2 * (naive - exact).abs().max() + 0.01


@on_gpu
def test_a_run_under_torchrun_trains_on_every_gpu(tiny, tmp_path):
    gpus = torch.cuda.device_count()
    flags = training(tiny, tmp_path, "--prompts_per_step", gpus, "--sft_batch", gpus)
    run(*TORCHRUN[:-1], gpus, "dipr1.py", *flags)
    lines = lines_of(tmp_path)
    assert len(lines) == 6 and not any(line["skipped"] for line in lines) and lines[-1]["sampler_gap"] < 0.1


@on_gpu
def test_a_step_at_3b_fits_80_gb():
    policy, prompt = random_policy("3b", "cuda")
    reference, optimizer = copy.deepcopy(policy).eval().requires_grad_(False), dipr1.make_optimizer(policy)
    torch.cuda.reset_peak_memory_stats()
    group = our_rollout(policy, prompt, 8, 1024)
    group.advantages = torch.linspace(-1, 1, group.n_tokens, device="cuda")
    with torch.no_grad():
        group.ref_logp = reference([group])[0]
    assert not dipr1.update(policy, optimizer, [group], Config(), 1e-6)["skipped"]
    assert torch.cuda.max_memory_allocated() < 80e9


# ------------------------------------------------------------------------------------------------------------
# data_prep.py: images, scenes, and every data set laid out as it ships, with pictures that we make

ODGT, WIDER18, WIDER19, COCO = ("annotation_val.odgt", "val_annotations.txt", "Annotations/val_bbox.txt",
                                "annotations/instances_val2017.json")
GREY = np.array([[0.0, 0.5, 1.0]])
HEAD = {"head_attr": {"ignore": 1}}  # concerns the head alone
person = lambda fbox, tag="person", **extra: HEAD | {"tag": tag, "fbox": fbox, "extra": extra}
INK = Image.fromarray(np.array([[[0, 0, 0, 255], [0, 0, 0, 0]]], np.uint8))  # on a transparent ground


def make_images(paths, size=IMAGE):
    """An image of this size at each path."""
    for path in paths:
        Image.new("RGB", size, (90, 120, 150)).save(write(path))


def convert(command, root, *more, out=None):
    """Run the command line -> the records that it wrote."""
    (source, *flags), out = command.split(), out or Path(root).parent / "out.jsonl"
    data_prep.main([source, str(root), "--out", str(out), *flags, *map(str, more)])
    return read_lines(out)


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "tiff"])
def test_images_are_upright_and_odd_orientations_do_no_harm(tmp_path, kind):
    path, corner = tmp_path / f"a.{kind}", np.zeros((80, 100, 3), np.uint8)
    corner[:40, :50] = 255  # white in the top left, when upright
    for value in [None, *range(10), 65000] + [b"II*\0\xff\xff"] * (kind != "tiff"):
        undo, exif = {6: 8, 8: 6}.get(value, value), Image.Exif()  # the orientation that undoes this one
        stored = Image.fromarray(corner)
        stored.getexif()[0x0112] = undo
        stored = ImageOps.exif_transpose(stored)
        exif.update({} if value is None else {0x0112: value})
        stored.save(path, exif=value if isinstance(value, bytes) else exif)
        image = data_prep.open_image(path)
        assert image.size == IMAGE and image.mode == "RGB"
        assert np.abs(np.asarray(image).astype(int)[[20, 60], [20, 80], 0] - [255, 0]).max() < 10


@pytest.mark.parametrize("name, image, expected", [
    ("16.png", (GREY * 65535).astype("u2"), [0, 127, 255]), ("low.png", (GREY * 514).astype("u2"), [0, 1, 2]),
    ("32.tiff", (GREY * 65535).astype("i4"), [0, 127, 255]), ("1.tiff", GREY.astype("f4"), [0, 128, 255]),
    ("byte.tiff", (GREY * 254).astype("f4"), [0, 127, 254]), ("one.png", GREY > 0.7, [0, 0, 255]),
    ("word.tiff", (GREY * 65535).astype("f4"), [0, 127, 255]), ("RGBA.png", INK, [0, 255]),
    ("nan.tiff", np.array([[np.nan, 0.5, 1, np.inf]], "f4"), [0, 128, 255, 0]),
    ("LA.png", INK.convert("LA"), [0, 255]), ("P.png", INK.quantize(2), [0, 255]),
])
def test_every_depth_and_transparency_becomes_8_bit_rgb(tmp_path, name, image, expected):
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(tmp_path / name)
    opened = np.asarray(data_prep.open_image(tmp_path / name))
    assert opened.shape[2] == 3 and np.abs(opened[0].astype(int).mean(axis=1) - expected).max() <= 1


def test_what_cannot_be_opened_is_an_oserror_with_a_reason(tmp_path):
    make_images([path := tmp_path / "a.jpg"])
    whole = path.read_bytes()
    with mock.patch.object(Image, "MAX_IMAGE_PIXELS", 100), pytest.raises(OSError, match="exceeds limit"):
        data_prep.open_image(path)  # a header may claim 30 GB
    for content in (whole[:-100], b"\x89PNG\r\n\x1a\n" + bytes(40), b"hello", b""):
        with pytest.raises(OSError, match=r"\w+ \w+"):
            data_prep.open_image(write(path, content))
    for name, said in {"gone.png": "^No such file or directory$", "": "^Is a directory$"}.items():
        with pytest.raises(OSError, match=said):
            data_prep.open_image(tmp_path / name)
    for size in ((2010, 10), (10, 2010), (2000, 10), (1, 1)):
        Image.new("RGB", size).save(tmp_path / "a.png")
        says = pytest.raises(OSError, match="ratio above 200") if 2010 in size else contextlib.nullcontext()
        with says:
            assert data_prep.open_image(tmp_path / "a.png").size == size


def test_scenes_repeat_from_their_seed_and_are_what_they_say(tmp_path):
    records, pixels = {}, {}
    for name, crowd, least, most, overlap in (("a", "sparse", 1, 5, 0.4), ("b", "sparse", 1, 5, 0.4),
                                              ("dense", "dense", 3, 8, 0.5), ("night", "night", 1, 6, 0.45)):
        data_prep.synthetic(folder := tmp_path / name, 20, 10, seed=4, crowd=crowd)
        records[name] = [*read_lines(folder / "train.jsonl"), *read_lines(folder / "val.jsonl")]
        pixels[name] = [np.asarray(data_prep.open_image(folder / line["image"])) for line in records[name]]
        for record in records[name]:
            people = record["boxes"] + record["ignore"]
            assert least <= len(people) <= most and record["boxes"]
            data_prep.check_rows("boxes", people, 4, 112, 112)
            assert all(data_prep.iou(a, b) < overlap for k, a in enumerate(people) for b in people[:k])
    assert records["a"] == records["b"] and len(read_lines(tmp_path / "a/val.jsonl")) == 10
    assert [Path(record["image"]).stem for record in records["a"]] == [f"{k:06d}" for k in range(30)]
    assert np.array_equal(pixels["a"], pixels["b"])
    assert not np.array_equal(pixels["a"][0][0], pixels["dense"][0][0])  # another street, too
    for measure in (np.mean, np.std):
        assert measure(pixels["night"]) < 0.7 * measure(pixels["a"])  # dark, and of low contrast
    assert 0 < sum(len(record["ignore"]) for record in records["dense"]) < 30  # the hidden, and no others
    solid = np.array(data_prep.draw_person(np.random.default_rng(0), 60).getchannel("A")) > 127
    assert solid[0].any() and solid[-1].any() and solid[:, 0].any() and solid[:, -1].any(), "a tight box"


def test_the_tiny_tokenizer_has_a_token_for_each_sentence():
    tokenizer = data_prep.tiny_tokenizer(20, ["<|im_start|>user\n{question}<|im_end|>\n", "Find {target}."])
    for text, length in (("Find cat.", 1 + 3 + 1), ("[[1, 2, 3, 20]]", 6),
                         ("<think>3 in sight, 2 to look at</think>", 6)):  # as dipr1.py writes targets
        assert len(tokenizer.encode(text)) == length


def crowdhuman_layout(root, entries):
    make_images(root / "Images" / f"{name}.jpg" for name in entries)
    write(root / "annotation_train.odgt", *({"ID": name, "gtboxes": entries[name]} for name in entries))
    return root


def test_crowdhuman_converts_and_says_what_became_of_everything(tmp_path, capsys):
    people = [person([10, 10, 20, 30]), person([90, 70, 40, 40]), person([5, 5, -3, 9]),
              person([50, 0, 9, 9], "mask"), person([0, 0, 9, 9], ignore=1),
              {"tag": "person", "fbox": [1, 2, 3, 4]}]
    root = crowdhuman_layout(tmp_path / "ch", {"1,a": people, "2,b": [person([0, 0, 5, 5])] * 41, "3,c": [],
                                               "cut": [], "gone": []})
    write(root / "Images/cut.jpg", (root / "Images/1,a.jpg").read_bytes()[:-20])
    (root / "Images/gone.jpg").unlink()
    first, empty = convert("crowdhuman --split train --draw 1", root)
    # The second is clipped, the one of negative width dropped; a person without the optional keys counts.
    assert first == {"image": "ch/Images/1,a.jpg", "width": 100, "height": 80, "target": "person",
                     "boxes": [[10, 10, 30, 40], [90, 70, 100, 80], [1, 2, 4, 6]],
                     "ignore": [[50, 0, 59, 9], [0, 0, 9, 9]]}
    assert empty["boxes"] == [] and (tmp_path / "out-0.png").exists()
    said = capsys.readouterr()
    for part in ("2 lines", "3  boxes", "2  ignore", "median 1.5, max 3", "1  left out: boxes without area",
                 "1  left out: images with more than 40 boxes", "2  left out: unreadable images"):
        assert part in said.out, said.out
    assert all(f"{name}.jpg: " in said.err for name in ("cut", "gone"))
    assert len(convert("crowdhuman --split train --max_boxes 41", root)) == 3
    (root / "annotation_train.odgt").rename(root / ODGT)  # only training has a limit unasked
    assert [len(r["boxes"]) for r in convert("crowdhuman --split val", root)] == [3, 41, 0]
    for out, said in ((root / ODGT / "out.jsonl", "out.jsonl"), (tmp_path, "is a folder or a file to read"),
                      (root / ODGT, "is a folder or a file to read")):
        refused(said, convert, "crowdhuman --split val", root, out=out)
    (tmp_path / "far/away").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far/away")  # whose .. is not where the link lies
    linked = convert("crowdhuman --split val", root, out=tmp_path / "link/out.jsonl")
    assert all((tmp_path / "link" / record["image"]).exists() for record in linked)
    # Images may lie in the folders of the data set's zips.
    root = crowdhuman_layout(tmp_path / "zips", {name: [] for name in "abc"})
    shutil.rmtree(root / "Images")
    images = ["CrowdHuman_train01/a.jpg", "CrowdHuman_train03/Images/b.jpg", "CrowdHuman_val/c.jpg"]
    make_images(root / name for name in (*images, "thumbnails/c.jpg"))
    found = convert("crowdhuman --split train", root)
    assert [record["image"] for record in found] == [f"zips/{name}" for name in images[:2]]
    for name in images[:2]:
        (root / name).unlink()
    refused("unknown layout, looked there for Images/", convert, "crowdhuman --split train", root)


@pytest.mark.parametrize("command, said", [
    ("crowdhuman x --split train --out o --stride 2", "unrecognized"), ("uavdt x --out o", "required"),
    ("uavdt x --split val --out o", "invalid choice"), ("uavdt x --split train --out o --stride 0", "than 1"),
    ("synthetic --out o --train 0", "less than 1"), ("synthetic --out o --size 20", "least 56"),
    ("coco x --out o", "--split or"), ("coco x --split val --target a --category all --out o", "no --target"),
    ("ocr x --out o --draw -1", "than 1"),
    *[("coco --help", part) for part in  # which has the docstrings and each default
      ("`iscrowd` and `ignore` mark", "40 for train", "default: person", "default: 0", "required")],
])
def test_what_a_command_does_not_take_is_refused_before_anything_is_written(command, said, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        data_prep.main(command.replace(" o", f" {tmp_path}/o").split())
    assert said in "".join(capsys.readouterr()) + str(stop.value) and not list(tmp_path.iterdir())


def test_both_forms_of_citypersons_say_the_same_and_numbers_do_not_wrap_around(tmp_path):
    names = ["ignore", "pedestrian", "rider", "sitting person", "person (other)", "person group"]
    rows = np.array([[k, 200 + k, 100, 100, 250, 0, 0, 0, 0, 0] for k in range(6)], np.uint8)
    tables = {"a": rows, "b": -rows.astype(np.int16), "c": np.zeros((0, 10), np.uint8)}
    cells, kind = np.empty((1, 3), object), [("cityname", "O"), ("im_name", "O"), ("bbs", "O")]
    for k, (name, table) in enumerate(tables.items()):  # nested as in the real file: 1 x 1 structs in cells
        image = f"{name}_leftImg8bit.png"
        cells[0, k] = np.array([[(np.array(["bonn"]), np.array([image]), table)]], dtype=kind)
        objects = [{"label": names[abs(row[0])], "bbox": row[1:5]} for row in table.tolist()]
        file = tmp_path / f"json/gtBboxCityPersons/val/bonn/{name}_gtBboxCityPersons.json"
        write(file, {"imgWidth": 2048, "imgHeight": 1024, "objects": objects})
        images = [tmp_path / form / "leftImg8bit/val/bonn" / image for form in ("mat", "json")]
        make_images(images, (2048, 1024))
    (tmp_path / "mat/annotations").mkdir()
    savemat(tmp_path / "mat/annotations/anno_val.mat", {"anno_val_aligned": cells})
    mat, parsed = (convert("citypersons --split val", tmp_path / form) for form in ("mat", "json"))
    assert [r | {"image": ""} for r in mat] == [r | {"image": ""} for r in parsed] and len(mat) == 3
    assert mat[0]["boxes"] == [[201, 100, 301, 350]] and len(mat[0]["ignore"]) == 5  # 301, and not 45
    assert mat[0]["target"] == "pedestrian" and mat[1]["boxes"] == mat[2]["boxes"] == []
    write(file, {"imgWidth": 1024, "imgHeight": 512, "objects": objects})
    assert len(convert("citypersons --split val", tmp_path / "json")) == 2


def test_the_two_wider_forms_are_told_apart(tmp_path, capsys):
    """Twenty numbers are four boxes of 2018 and five of 2019; read in the wrong form they are nonsense."""
    text = " ".join(map(str, [1, 10, 20, 5, 6] * 4))
    write(tmp_path / "w18/val_annotations.txt", f"img1.jpg {text}\nimg2.jpg\nimg3.jpg 2 1 2 3 4\n")
    write(tmp_path / "w18/ignore_part_val.txt", "img1.jpg 0 0 9 9\nimg9.jpg 0 0 9 9\n")
    make_images([tmp_path / f"w18/{split}/img{k}.jpg" for k in (1, 2, 3) for split in ("val", "train")])
    first, bare, cyclist = convert("widerpedestrian --split val", tmp_path / "w18")
    assert "1  left out: annotations of images that are not listed" in capsys.readouterr().out
    assert first["boxes"] == [[10, 20, 15, 26]] * 4 and first["ignore"] == [[0, 0, 9, 9]]
    assert bare["boxes"] == [] and cyclist["boxes"] == [[1, 2, 4, 6]]
    assert first["image"] == "w18/val/img1.jpg"  # and not the other split's, of the same name
    (tmp_path / "w18/val_annotations.txt").rename(tmp_path / "w18/train_annotations.txt")
    assert convert("widerpedestrian --split train", tmp_path / "w18")[0]["image"] == "w18/train/img1.jpg"
    write(tmp_path / "w19/Annotations/train_bbox.txt", f"ad1.jpg {text}\nsur2.jpg\n")
    write(tmp_path / "w19/Annotations/train_ignore.txt", "sur2.jpg 1 1 7 7 2 2 9 9\n")
    make_images([tmp_path / "w19/ad_train/ad_03/ad1.jpg", tmp_path / "w19/sur_train/sur2.jpg"])
    first, bare = convert("widerpedestrian --split train", tmp_path / "w19")
    assert len(first["boxes"]) == 5 and first["boxes"][0] == [1, 10, 21, 15]
    assert len(bare["ignore"]) == 2 and first["image"] == "w19/ad_train/ad_03/ad1.jpg"


def test_uavdt_rows_are_sorted_by_target_and_a_file_without_classes_is_refused(tmp_path):
    root, images = tmp_path / "u", tmp_path / "u/UAV-benchmark-M"
    names = [f"M0101/img00000{frame}" for frame in (1, 2, 3, 4)] + ["M0203/img000001", "M0101/img000001_det"]
    make_images(images / f"{name}.jpg" for name in names)  # the last is somebody's own
    rows = [f"{frame},{target},{10 * target},5,8,9,1,1,{target}" for target in (1, 2, 3) for frame in (3, 1)]
    write(root / "GT/M0101_gt_whole.txt", *rows)
    write(root / "GT/M0203_gt_whole.txt", "1,1,0,0,9,9,1,1,1")  # of the test split
    write(root / "GT/M0101_gt_ignore.txt", "1,9,60,8,5,4,1,-1,-1\n")
    records = convert("uavdt --split train", root)
    assert [[box[0] for box in r["boxes"]] for r in records] == [[10, 20, 30], [], [10, 20, 30], []]
    assert records[0]["ignore"] == [[60, 8, 65, 12]] and len(convert("uavdt --split test", root)) == 1
    strided = convert("uavdt --split train --stride 2 --target car", root)
    assert [(r["image"][-7:], r["target"]) for r in strided] == [("001.jpg", "car"), ("003.jpg", "car")]
    write(root / "GT/M0101_gt_whole.txt", "1,1,0,0,9,9,1,1,-1")  # gt.txt under the name of gt_whole.txt
    refused("M0101_gt_whole.txt, line 1.*gt_whole.txt", convert, "uavdt --split train", root)
    (root / "GT/M0101_gt_whole.txt").rename(root / "GT/M0101_gt.txt")
    refused("looked there for M0101_gt_whole.txt", convert, "uavdt --split train", root)
    write(root / "GT/M0203_gt_whole.txt", "1,1,0,0,9,9,1,1,1\n1,1,0,0,9")
    refused("M0203_gt_whole.txt, line 2: ", convert, "uavdt --split test", root)
    for path in (*root.glob("GT/M0101*"), images / "M0101"):
        path.rename(tmp_path / path.name)
    refused("no sequence of --split train, found M0203", convert, "uavdt --split train", root)


def coco_layout(root, rows, images=("a.jpg", "b.jpg"), names=((1, "person"), (90, "toothbrush")), **sizes):
    """`rows`: (image number, category, box, further keys); `sizes`: {an image's stem: stated size}."""
    listed = [{"id": k, "file_name": image} for k, image in enumerate(images)]
    for entry in listed:
        entry |= dict(zip(("width", "height"), sizes.get(Path(entry["file_name"]).stem, ())))
    annotations = [{"image_id": image, "category_id": category, "bbox": box, **dict(*more)}
                   for image, category, box, *more in rows]
    categories = [{"id": number, "name": name} for number, name in names]
    write(root / COCO, {"images": listed[::-1], "annotations": annotations, "categories": categories})
    make_images([root / "val2017" / image for image in images])
    return root


def test_coco_asks_for_one_category_or_for_each_that_an_image_has_and_one_that_it_has_not(tmp_path):
    rows = [(0, 90, [500, 2, 3, 4]), (0, 1, [1.5, 2, 3, 4], {"iscrowd": 0, "ignore": 0}),
            (0, 2, [0, 0, 50, 60], {"iscrowd": 1}), (0, 2, [5, 5, 9, 9], {"iscrowd": 0, "ignore": 1}),
            (0, 90, [9, 9, 9, 9])]
    images, names = [f"{k}.jpg" for k in range(30)], ((1, "cat"), (2, " dog "), (90, "cat"), (3, "owl"))
    root = coco_layout(tmp_path / "co", rows, images, names)
    cats, dogs, *absent = asked = convert("coco --split val --category all", root)
    about = {"image": "co/val2017/0.jpg", "width": 100, "height": 80}
    assert cats == about | {"target": "cat", "boxes": [[1.5, 2, 4.5, 6], [9, 9, 18, 18]], "ignore": []}
    assert dogs == about | {"target": "dog", "boxes": [], "ignore": [[0, 0, 50, 60], [5, 5, 14, 14]]}
    assert absent[0]["target"] == "owl"  # the only class that the first image has not
    assert [record["image"] for record in absent] == [f"co/val2017/{name}" for name in images]  # one each
    assert {record["target"] for record in absent[1:]} == {"cat", "dog", "owl"}
    with sizes_from(opened := mock.Mock(return_value=IMAGE)):  # it repeats, and opens an image once
        assert convert("coco --split val --category all", root) == asked and opened.call_count == 30
    cat, dog = (convert(f"coco --split val --category {name}", root) for name in ("cat", "dog"))
    assert (cat[0], dog[0]) == (cats, dogs) and len(cat) == len(dog) == 30
    assert convert("coco --split val --category cat --target pet", root)[0] == cats | {"target": "pet"}
    coco_layout(root, [(0, 1, [1, 2, 3, 4]), (1, 1, [1, 2, 3, 4], {"iscrowd": 1})], names=((1, "cat"),))
    assert len(convert("coco --split val --category all", root)) == 2  # no class is absent


def test_images_of_coco_lie_in_the_folder_of_their_split_or_in_the_one_that_is_named(tmp_path):
    root = coco_layout(tmp_path / "co", [], ["a.jpg", "seq/a.jpg"])
    make_images([root / "a.jpg", root / "seq/a.jpg", tmp_path / "else/seq/a.jpg"], (8, 8))
    flags, annotations = "coco --category person", ("--annotations", root / COCO)
    for command, more, folder in (("coco --split val", (), "co/val2017"), (flags, annotations, "co"),
                                  (flags + " --split val", annotations, "co/val2017")):
        found = [record["image"] for record in convert(command, root, *more)]
        assert found == [f"{folder}/a.jpg", f"{folder}/seq/a.jpg"]
    found = convert("coco --split val", root, "--image_folder", tmp_path / "else")
    assert [r["image"] for r in found] == ["else/seq/a.jpg"]
    (root / "val2017").rename(root / "val")
    refused("co: unknown layout, looked there for val2017", convert, "coco --split val", root)


def test_what_contradicts_its_image_is_left_out_and_counted(tmp_path, capsys):
    rows = [(k, 1, [1, 2, 3, 4]) for k in (0, 2, 99)] + [(1, 1, [0.1, 0.2, 0.3, 0.4])]
    stated = {"right": IMAGE, "other": (200, 160), "turned": IMAGE, "none": (0, None)}
    root = coco_layout(tmp_path / "co", rows, ["0.jpg", "fractions.jpg", *(f"{name}.jpg" for name in stated)],
                       **stated)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", IMAGE).save(root / "val2017/turned.jpg", exif=exif)
    found = [Path(r["image"]).stem for r in convert("coco --split val", root)]
    assert found == ["0", "right", "none"]
    said = capsys.readouterr()
    assert "3  left out: lines that contradict" in said.out
    assert "1  left out: annotations of images that are not listed" in said.out
    assert "fractions.jpg: boxes are all between 0 and 1" in said.err
    assert "other.jpg: the image has 100 x 80 pixels, the annotation 200 x 160" in said.err
    assert "turned.jpg: the image has 80 x 100 pixels, the annotation 100 x 80" in said.err


REFS = [{"ref_id": k, "ann_id": ann, "image_id": image, "split": split,
         "sentences": [{"sent": phrase} for phrase in said]}
        for k, (ann, image, split, *said) in enumerate([
            (1, 7, "train", "the left one ", "red shirt"), (1, 7, "testA", "x"), (2, 7, "train", "outside"),
            (3, 5, "train", "sticks out"), (1, 99, "train", "its image is not listed")])]


def test_refcoco_gives_a_line_for_each_phrase_and_runs_no_pickle(tmp_path, capsys):
    refs = write(tmp_path / "r/refs(unc).p", pickle.dumps(REFS, protocol=2))
    make_images([tmp_path / f"{folder}/{k}.jpg" for folder in ("r/train2014", "COCO") for k in (5, 7)])
    write(tmp_path / "r/instances.json", {
        "images": [{"id": k, "file_name": f"{k}.jpg"} for k in (5, 7)],
        "annotations": [{"id": 1, "bbox": [10, 20, 30, 40]}, {"id": 2, "bbox": [200, 0, 9, 9]},
                        {"id": 3, "bbox": [90, 70, 30, 40]}]})
    out = tmp_path / "out.jsonl"
    edge, a, b = convert("refcoco --split train --draw 1", refs, out=out)  # an image after the other
    assert a == {"image": "r/train2014/7.jpg", "width": 100, "height": 80, "task": "grounding",
                 "target": "the left one", "boxes": [[10, 20, 40, 60]]} and b["target"] == "red shirt"
    assert edge["boxes"] == [[90, 70, 100, 80]]
    said = capsys.readouterr()
    assert "1  left out: lines that contradict" in said.out and "1  left out: annotations of" in said.out
    assert "7.jpg: the box of the phrase has no area inside" in said.err
    (named,) = convert("refcoco --split testA", refs, "--image_folder", tmp_path / "COCO", out=out)
    assert named["image"] == "COCO/7.jpg"
    refused("a file to read", convert, "refcoco --split testA", refs, out=refs)
    names = "refs.unc..p: UnpicklingError: it names"
    for content, said in ((pickle.dumps(os.system), names), (pickle.dumps([Path("x")]), names),
                          (pickle.dumps(REFS)[:-9], "refs.unc..p: "),
                          (pickle.dumps([REFS[0] | {"ann_id": 8}]), "reference 0: no 8"),
                          (pickle.dumps([REFS[0] | {"sentences": [{"sent": " "}]}]), "reference 0: a text")):
        write(refs, content)
        refused(said, convert, "refcoco --split train", refs, out=tmp_path / "none")
    assert not (tmp_path / "none").exists()


PEOPLE = {"images": [{"id": 1, "file_name": "a.jpg"}], "categories": [{"id": 7, "name": "person"}],
          "annotations": []}
BIRDS = {"image": "a.jpg", "points": [{"x": 10, "y": 20.5}, {"x": 99, "y": 79}], "count": 2, "label": " bird"}
SHA = {"image_url": "https://host/some%20path/b.jpg?size=big", "points": {"x": [10, 99], "y": [20.5, 79]},
       "image_sha256": "a", "count": 2, "label": "bird"}
POINTS = {"task": "counting", "target": "bird", "points": [[10, 20.5], [99, 79]]}
TURNS = [{"from": "human", "value": "<image> Read."}, {"from": "gpt", "value": "Two\nlines"}]


@pytest.mark.parametrize("command, content, fields", [
    ("pixmo_count", [BIRDS], POINTS), ("pixmo_count", [SHA], POINTS),
    ("pixmo_count", [SHA | {"points": None, "count": 5}], {"task": "counting", "target": "bird", "count": 5}),
    ("pixmo_count", [BIRDS | {"points": [], "count": 0}], POINTS | {"points": []}),
    ("ocr", [[{"image": "a.jpg", "conversations": TURNS}]],
     {"task": "ocr", "target": "text", "transcript": "Two\nlines"}),
])
def test_other_tasks_have_their_images_beside_the_list_or_in_a_folder(tmp_path, command, content, fields):
    make_images([tmp_path / "a.jpg", tmp_path / "images/a.jpg"])
    path, line = write(tmp_path / "list.jsonl", *content), {"width": 100, "height": 80, **fields}
    assert convert(command, path, out=tmp_path / "o.jsonl") == [{"image": "a.jpg", **line}]
    refused("is a folder or a file to read", convert, command, path, out=path)
    more = ("--draw", "1", "--image_folder", tmp_path / "images")
    assert convert(command, path, *more, out=tmp_path / "o.jsonl") == [{"image": "images/a.jpg", **line}]


@pytest.mark.parametrize("command, file, content, said", [
    ("crowdhuman", ODGT, '{"ID": "1", "gtboxes": []}\n{"ID": "2"}\n', "odgt, line 2: no 'gtboxes'"),
    ("crowdhuman", ODGT, '{"ID": "1", "gtboxes": []}\n[]\n', "odgt, line 2: a JSON object is expected"),
    ("crowdhuman", ODGT, {"ID": "1", "gtboxes": [person([1, 2, 3])]}, r"line 1: boxes, row 1: \[1, 2, 3"),
    ("crowdhuman", ODGT, "\n", "nothing converted"), ("crowdhuman", "else", "", "there for annotation_val"),
    ("widerpedestrian", WIDER18, "img1.jpg 1 2 3 4 5\nimg2.jpg 1 2 3 4\n", "line 2.*4 numbers"),
    ("widerpedestrian", WIDER18, "img1.jpg 7 2 3 4 5", "line 1.*class"),
    ("widerpedestrian", WIDER19, "cat.jpg 1 2 3 4", "line 1.*cat.jpg"),
    ("widerpedestrian", WIDER19, "sur1.jpg 1 2 3 nan", "bbox.txt, line 1: boxes, row 1"),
    *[("coco", COCO, PEOPLE | {"annotations": [{"image_id": 1, "category_id": 7, "bbox": [1, 2, 3, 4]}, {
        "image_id": 1, "category_id": 7, "bbox": [1, 2, 3, 4]} | changes]}, "json, annotation 2: " + said)
      for changes, said in [
          ({"bbox": [1, 2, 3]}, r"bbox, row 1: \[1, 2, 3\] is not 4"), ({"bbox": [1, 2, 3, None]}, "bbox"),
          ({"bbox": [1, 2, NAN, 4]}, "bbox"), ({"category_id": 8}, "no 8"), ({"bbox": None}, "bbox")]],
    *[("coco", COCO, PEOPLE | changes, said) for changes, said in [
        ({"annotations": [{}]}, "annotation 1: no 'image_id'"), ({"annotations": None}, "2017.json: TypeE"),
        ({"annotations": [{"image_id": "1"}]}, "no annotation refers to an image that is listed"),
        ({"images": [{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}]}, "2 images have the id 1"),
        ({"images": [{"id": k, "file_name": "a"} for k in (1, 2)]}, "2 images have the file_name 'a'"),
        ({"categories": [{"id": 1, "name": " "}]}, "2017.json: a text is expected"),
        ({"categories": [{"id": 1, "name": "dog"}]}, "no category 'person', but 'dog'")]],
    ("citypersons", "gtBboxCityPersons/val/a/b_gtBboxCityPersons.json", {"objects": [{}]}, "b_gt.*no 'la"),
    ("citypersons", "annotations/anno_val.mat", "no matlab file at all", "anno_val.mat: "),
    *[("pixmo_count", "list", BIRDS | changes, said) for changes, said in [
        ({"count": 3}, "line 1: count is 3, but there are 2 points"), ({"count": None}, "count is None"),
        ({"points": {"x": [1], "y": []}}, "line 1: zip"), ({"points": [{"x": 1, "y": None}] * 2}, "not 2"),
        ({"label": "<|im_end|>"}, "line 1: .*special token"), ({"image": None}, "line 1: no 'image_sha256'"),
        ({"points": [{"x": 200, "y": 1}] * 2}, "nothing converted.*1 left out: lines that contradict")]],
    ("pixmo_count --image_folder nowhere", "list", SHA, "nothing converted.*1 left out: unreadable images"),
    ("ocr", "list", [{"image": "a.jpg", "conversations": TURNS[:1]}], "list, entry 1: "),
    ("ocr", "list", {}, "nothing converted"), ("ocr", "list", "5", "list: TypeError"),
])
def test_what_is_malformed_is_said_with_its_place_and_no_file_is_left(tmp_path, command, file, content, said):
    root, is_list = tmp_path / "root", file == "list"
    make_images(root / folder / "a.jpg" for folder in ("", "Images", "leftImg8bit/val", "val", "val2017"))
    path, command = write(root / file, content), command + " --split val" * (not is_list)
    refused(said, convert, command, path if is_list else root, out=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["root"]


def sizes_from(size_of):
    """For a while, a function of its path says how large an image is, which need not be there."""
    here = SimpleNamespace(map=lambda function, *items, chunksize: map(function, *items))
    return mock.patch.multiple(data_prep, ProcessPoolExecutor=lambda: contextlib.nullcontext(here),
                               open_image=lambda path: SimpleNamespace(size=size_of(path)))


def test_converting_takes_the_same_memory_however_long_the_file(tmp_path):
    crowd, peaks = [person([k, 2, 30, 60], box_id=k, occ=0) for k in range(23)], []
    for n in (600, 1200):
        root = crowdhuman_layout(tmp_path / f"{n}", {str(k): crowd for k in range(n)})
        tracemalloc.start()
        data_prep.convert(data_prep.crowdhuman(root, "train"), tmp_path / "o.jsonl")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(read_lines(tmp_path / "o.jsonl")) == n
    assert peaks[1] - peaks[0] < 500_000, peaks  # of 600 paths; the lines are 1.6 MB, and more when parsed


@needs_real
@pytest.mark.parametrize("command, file, source, right", [
    ("crowdhuman --split train", "annotation_train.odgt", "crowdhuman*.odgt", (5, 41, 2)),
    ("citypersons --split val", "annotations/anno_val.mat", "city*.mat", (500, 3157, 2638)),
    ("widerpedestrian --split train", "train_annotations.txt", "wider2018*", (5, 37, 0)),
    ("uavdt --split test", "M0208", "uavdt/M0208*", (265, 790, 265)),
    ("uavdt --split train --max_boxes 99", "M0101", "uavdt_M0101*", (407, 5414, 670)),
    ("coco --split val --category pedestrian", COCO, "citypersons/val_gt*", (500, 3157, 2638)),
    ("coco --split val --category pedestrain", COCO, "wider2019*", (200, 781, 0)),
])
def test_real_files_convert_to_the_right_counts(tmp_path, command, file, source, right):
    """Lines, boxes and ignore regions. Without their images: COCO's form states their sizes, the others get
    one that is large."""
    root, sources, stated = tmp_path / "root", sorted(REAL.glob(source)), {}
    for folder in ("Images", "train", "leftImg8bit/val", "val2017", f"UAV-benchmark-M/{file}"):
        write(root / folder / "0.jpg")
    if "uavdt" in command:
        for path in sources:
            write(root / "GT" / path.name.removeprefix("uavdt_"), path.read_bytes())
        for frame in range(1, right[0] + 1):
            write(root / f"UAV-benchmark-M/{file}/img{frame:06d}.jpg")
    else:
        write(root / file, *(path.read_bytes() for path in sources))
    if file == COCO:
        images = json.loads(sources[0].read_text())["images"]
        stated = {Path(image["file_name"]).name: (image["width"], image["height"]) for image in images}
    with sizes_from(lambda path: stated.get(path.name, (4096, 4096))):
        convert(command, root)
    records = dipr1.load_records(tmp_path / "out.jsonl")
    assert (len(records), *(sum(len(r[name]) for r in records) for name in ("boxes", "ignore"))) == right


# ------------------------------------------------------------------------------------------------------------
# python test_dipr1.py: the naive way of the tests and ours, timed side by side; --compare N: SFT,
# Perception-R1 and DIP-R1 from one start, on the same scenes, for the same time

SFT_RATES = 3.125e-6, 6.25e-6, 1.25e-5  # SFT has the best of them, found on seed 0
WAYS = {  # what goes on from the start, beside SFT; Perception-R1's steps are shorter, so it takes more
    "DIP-R1": dict(), "DIP-R1 without look": dict(look_weight=0.0),
    "Perception-R1": dict(method="perception-r1", steps=306)}
COLUMNS = [("dense", "f1"), ("dense", "precision"), ("dense", "ap50"), ("sparse", "f1"), ("night", "f1"),
           ("dense", "sampled_look_reward"), ("training", "minutes")]  # what is printed; compare.json has all
CURVES, MOMENTS = {"SFT": "#d1495b", "DIP-R1": "#00798c"}, 6  # the colour of each; checkpoints of a way
SHAPES = {  # of tower and decoder; are the embeddings tied?; the image's patches; tokens of a completion
    "small": ((6, 256, 512, 4, 512), (16384, 512, 1536, 4, 8, [8, 12, 12]), False, (32, 32), [128]),
    "3b": ((32, 1280, 3420, 16, 2048), (151936, 2048, 11008, 36, 16, [16, 24, 24]), True, (64, 80),
           [512, 1024])}


def compare_once(seed, folder, rates, **options):
    """One seed -> the best of SFT's rates, each way's figures on each crowd, and the curves of SFT and
    DIP-R1: figures of the greedy answers at each moment. Both do what the demo does.
    Interrupted, it goes on."""
    always = dict(demo=True, seed=seed, output_dir=str(folder), resume=True, keep=0)
    cfg = Config(**{**dipr1.DEMO, **always, **options})
    start = dipr1.pretrained(cfg)
    cfg = dataclasses.replace(cfg, model=start.model, data=str(folder / "dense/train.jsonl"))
    ways = {f"SFT, lr {rate:g}": dict(steps=0, sft_lr=rate) for rate in rates}
    ways |= {name: dict(sft_steps=0) | way for name, way in WAYS.items()}
    if seed == 0:  # with 400 labels, and the best of SFT's rates for them: .598 at 1.25e-5, .615 at 2.5e-5
        if dist.get_rank() == 0:
            data_prep.synthetic(folder / "many", train=400, val=0, seed=1000, crowd="dense")
        dist.barrier()
        many = dict(data=str(folder / "many/train.jsonl"))
        ways["SFT, 400 labels"] = dict(steps=0, sft_lr=5e-5) | many
        ways["DIP-R1, 400 labels"] = dict(sft_steps=0) | many
        ways["DIP-R1, plain sum"] = dict(sft_steps=0, look_credit="completion")
    runs = {"start": start, "start, answer alone": dataclasses.replace(start, method="perception-r1")}
    for name, way in ways.items():
        run = dataclasses.replace(cfg, output_dir=f"{folder}/{name}", **way)
        runs[name] = dipr1.train(dataclasses.replace(run, save_every=(run.sft_steps + run.steps) // MOMENTS))
    alone = dict(method="perception-r1", output_dir=f"{folder}/DIP-R1, answer alone")
    runs["DIP-R1, answer alone"] = dataclasses.replace(runs["DIP-R1"], **alone)
    figures = {name: dipr1.evaluated(run, folder) for name, run in runs.items()}
    for name in ways:
        seconds = sum(line["seconds"] for line in read_lines(folder / name / "metrics.jsonl"))
        figures[name]["training"] = {"minutes": seconds / 60}
    rate = max(rates, key=lambda rate: figures[f"SFT, lr {rate:g}"]["dense"]["f1"])
    curves, figures["SFT"] = {}, figures[f"SFT, lr {rate:g}"]
    for name, run in zip(CURVES, (runs[f"SFT, lr {rate:g}"], runs["DIP-R1"])):
        curves[name] = [figures["start"]]
        for moment in map(str, sorted(Path(run.output_dir).glob("checkpoint-??????"))):
            then = dataclasses.replace(run, model=moment, output_dir=moment, samples=0)
            curves[name].append(dipr1.evaluated(then, folder))
    figures["SFT, best moment"] = max(curves["SFT"][1:], key=lambda moment: moment["dense"]["f1"])
    return dict(seed=seed, rate=rate, figures=figures, curves=curves)


def compare(seeds, folder, **options):
    """Compare on seeds 0 .. N-1: print the table, write compare.json, with all figures, and curves.svg."""
    runs, rates = [], SFT_RATES
    for seed in range(seeds):
        runs.append(compare_once(seed, folder / f"seed-{seed}", rates, **options))
        rates = [runs[0]["rate"]]
        if dist.get_rank() == 0:
            write(folder / "compare.json", runs)
            draw_curves(runs, folder / "curves.svg")
    report(runs)


def report(runs):
    """Print a row for each way, mean +- standard deviation over the seeds, and how far DIP-R1 is ahead of SFT
    on the same seed."""
    def values(name, crowd, figure):
        ways = [run["figures"][name] for run in runs if name in run["figures"]]
        return np.array([figures.get(crowd, {}).get(figure, np.nan) for figures in ways])
    spread = lambda values: np.std(values, ddof=1) if len(values) > 1 else 0.0
    mean = lambda values: f"{np.mean(values):.3f} +- {spread(values):.3f}"
    dipr1.print0(f"\n{len(runs)} seeds, held-out images; SFT's rate: {runs[0]['rate']:g}")
    for heads in zip(*COLUMNS):
        dipr1.print0(f"{'':<24}" + "".join(f"{head:>21}" for head in heads))
    for name in runs[0]["figures"]:
        dipr1.print0(f"{name:<24}" + "".join(f"{mean(values(name, *column)):>21}" for column in COLUMNS))
    for figure, other in itertools.product(("f1", "ap50"), ("SFT, best moment", "SFT")):
        ahead = values("DIP-R1", "dense", figure) - values(other, "dense", figure)
        dipr1.print0(f"dense {figure}, DIP-R1 - {other}, by seed: {mean(ahead)} ({ahead.round(3).tolist()})")


def draw_curves(runs, path, width=420, height=280):
    """F1 on the dense and the sparse crowd against the share of the steps, a line per seed, as an SVG."""
    shapes, size = [], f'width="{2 * width + 160}" height="{height + 75}"'
    def text(x, y, words, color="#333"):
        shapes.append(f'<text x="{x:.0f}" y="{y:.0f}" fill="{color}">{words}</text>')
    for left, crowd in (50, "dense"), (120 + width, "sparse"):
        text(left, 20, f"F1 on held-out {crowd} scenes, from 0 to 100% of the steps on the dense ones")
        down = lambda f1: 40 + height * (0.9 - f1) / 0.7
        for tick in np.arange(0.2, 0.91, 0.1):
            shapes.append(f'<path d="M{left},{down(tick):.1f} h{width}" stroke="#ddd"/>')
            text(left - 30, down(tick) + 5, f"{tick:.1f}")
        for number, (name, color) in enumerate(CURVES.items()):
            text(left + 8 + 40 * number, height + 30, name, color)
            for run in runs:
                x = np.linspace(left, left + width, len(run["curves"][name]))
                y = [down(figures[crowd]["f1"]) for figures in run["curves"][name]]
                line = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y))
                shapes.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"/>')
    write(path, f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="13">',
          f'<rect {size} fill="white"/>', *shapes, "</svg>\n")


def test_the_comparison_starts_all_from_the_same_weights_and_goes_on_where_it_was(tmp_path, capsys):
    starts, plain = [], dipr1.grpo_step
    def watched(policy, reference, optimizer, encoder, prompts, cfg, *rest):
        starts.append(policy.model.lm_head.weight.clone())
        assert {prompt.record["task"] for prompt in prompts} == {cfg.method}
        return plain(policy, reference, optimizer, encoder, prompts, cfg, *rest)
    small = dict(sft_steps=2, sft_batch=4, steps=2, prompts_per_step=2, group_size=2, max_new_tokens=16,
                 samples=2)
    scenes = {"sparse": (6, 2), "dense": (6, 2), "night": (0, 2)}
    with replaced(SCENES=scenes, PRETRAINING=dict(sft_steps=2, steps=0), grpo_step=watched), mock.patch.dict(
            WAYS["Perception-R1"], steps=2), mock.patch.dict(globals(), MOMENTS=2, SFT_RATES=SFT_RATES[:2]):
        for seeds in (1, 2):
            compare(seeds, tmp_path, **small)
    runs, said = json.loads((tmp_path / "compare.json").read_text()), capsys.readouterr().out
    assert len(runs) == 2 and {"start", "SFT", "SFT, best moment", *WAYS} < set(runs[0]["figures"])
    assert {len(curve) for run in runs for curve in run["curves"].values()} == {1 + 2}
    assert all(f"dense f1, DIP-R1 - {other}, by seed: " in said for other in ("SFT", "SFT, best moment"))
    assert len(starts) == 2 * (5 + 3), "two steps, five ways and three: what is done is not done again"
    assert all(torch.equal(starts[0], starts[k]) for k in (2, 4, 6, 8)) and not starts[0].equal(starts[10])
    assert (tmp_path / "curves.svg").read_text().count("<polyline") == 2 * 2 * 2  # crowds, ways, seeds

def random_policy(name, device):
    """A Qwen2.5-VL with random weights and a prompt for it: an image of noise between 56 random words. At 3B
    both ways recompute activations in the backward: otherwise the naive one would keep more than 80 GB."""
    tower, (vocabulary, *decoder, heads, sections), tied, (rows, columns), _ = SHAPES[name]
    tower = dict(zip(("depth", "hidden_size", "intermediate_size", "num_heads", "out_hidden_size"), tower))
    decoder = dict(zip(("hidden_size", "intermediate_size", "num_hidden_layers"), decoder))
    decoder |= dict(
        vocab_size=vocabulary, num_attention_heads=heads, num_key_value_heads=2, bos_token_id=None,
        eos_token_id=None, pad_token_id=0,
        rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=sections))
    config = Qwen2_5_VLConfig(
        vision_config=tower, text_config=decoder, tie_word_embeddings=tied, image_token_id=1,
        video_token_id=2, vision_start_token_id=3, vision_end_token_id=4)
    torch.manual_seed(0)
    with torch.device(device):
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        model = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=dtype)
    if name == "3b":
        model.activation_checkpointing_enable()
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(5, vocabulary, (56,), generator=generator)
    ids = torch.cat([words[:20], torch.tensor([3, *[1] * (rows * columns // 4), 4]), words[20:]]).to(device)
    grid = torch.tensor([[1, rows, columns]], device=device)
    pixels = torch.rand(rows * columns, 1176, generator=generator).to(device)
    positions, _ = model.model.get_rope_index(ids[None], (ids == 1).int()[None], grid)
    size = 14 * columns, 14 * rows
    prompt = dipr1.Prompt(0, {}, None, ids, positions[:, 0], pixels, grid, size, boxes(), boxes())
    return dipr1.Policy(model, range(vocabulary)), prompt


# `rollout`, with an EOS that never comes.
never_ends = SimpleNamespace(eos=[-1], decode=lambda ids: "")
our_rollout = lambda policy, prompt, G, n: sampled(policy, never_ends, [prompt], G, n)[0]


def naive_rollout(policy, prompt, G, new_tokens):
    """`generate`, which reads image and prompt G times."""
    ids = prompt.ids[None]
    out = policy.eval().model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=(ids == 1).int(),
        pixel_values=prompt.pixels, image_grid_thw=prompt.grid, num_return_sequences=G, do_sample=True,
        top_k=0, min_new_tokens=new_tokens, max_new_tokens=new_tokens, suppress_tokens=[1, 2, 3, 4])
    return Group(prompt, list(out[:, ids.shape[1]:]))


def one_step(policy, reference, prompt, G, new_tokens, rollout, score):
    """Rollout, then scoring: reference, policy forward, backward -> seconds of both and of all, and the
    megabytes that the policy's forward adds at its peak, kept for the backward or not."""
    gpu = prompt.ids.is_cuda
    def now():
        if gpu:
            torch.cuda.synchronize()
        return time.perf_counter()
    started = now()
    group = rollout(policy, prompt, G, new_tokens)
    written = now()
    with torch.no_grad():
        ref = score(reference, group)
    logp = score(policy.train(), group)
    advantages = torch.linspace(-1, 1, len(logp), device=logp.device)
    dipr1.grpo_loss(logp, logp.detach(), ref, advantages, 0.2, 0.04)[0].backward()
    ended = now()
    policy.zero_grad()
    del logp
    if gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        score(policy, group)
        added = torch.cuda.max_memory_allocated() - before
    else:
        with torch.profiler.profile(profile_memory=True) as profiler:
            score(policy, group)
        events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
        added = max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))
    return written - started, ended - written, ended - started, added / 1e6


def benchmark(shapes, new_tokens, G=8, repeats=5):
    """Measure both ways, turn by turn, and print the table: medians, and naive over ours."""
    policy, prompt = random_policy(shapes, "cuda" if torch.cuda.is_available() else "cpu")
    reference, measured = copy.deepcopy(policy).eval().requires_grad_(False), {"sdpa": [], "tree": []}
    ours = lambda policy, group: policy([group])[0]
    for _ in tqdm(range(repeats + 1), f"G {G}, {new_tokens} new tokens"):
        for attention, *way in (("sdpa", naive_rollout, plain_logprobs), ("tree", our_rollout, ours)):
            for model in (policy, reference):
                model.model.model.language_model.set_attn_implementation(attention)
            measured[attention].append(one_step(policy, reference, prompt, G, new_tokens, *way))
    millions = sum(p.numel() for p in policy.parameters()) / 1e6
    print(f"\n{millions:.0f}M parameters, prompt {len(prompt.ids)} tokens, G = {G}, {new_tokens} new tokens: "
          f"medians of {repeats}\n{'':<28}{'naive':>10}{'ours':>10}{'ratio':>8}")
    medians = [np.median(turns[1:], axis=0) for turns in measured.values()]  # the first warms up
    for name, a, b in zip(("rollout", "scoring", "whole step", "added memory, MB"), *medians):
        print(f"{name:<28}{a:>10.{3 if a < 1000 else 0}f}{b:>10.{3 if a < 1000 else 0}f}{a / b:>8.1f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Time the naive way and ours, or compare the methods.")
    parser.add_argument("--shapes", choices=SHAPES, default="small", help="3b wants a GPU of 80 GB")
    parser.add_argument("--compare", type=int, metavar="N",
                        help="instead, compare the methods on N seeds, in runs/compare; if interrupted it "
                             "goes on; torchrun --nproc_per_node 2 is faster")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.compare:
        dipr1.join_processes(Config(demo=True))
        compare(args.compare, Path("runs/compare"))
    else:
        for new_tokens in SHAPES[args.shapes][-1]:
            benchmark(args.shapes, new_tokens)
