"""What can go wrong in DIP-R1, told as tests: `pytest test_dipr1.py`, on a laptop CPU, with a tiny random Qwen2.5-VL.

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
import shutil
import signal
import socket
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import load_file
from scipy.io import loadmat, savemat
from tqdm import tqdm
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

import data_prep
import dipr1
from dipr1 import Config, Group, Response

HERE = Path(__file__).parent
REAL = HERE.parent / "shared" / "real"  # real annotation files, where somebody put them


def completion(look="[[0, 0, 28, 28]]", answer="[[0, 0, 28, 56]]", think="two people"):
    return f"<think>{think}</think><look>{look}</look><answer>{answer}</answer>"


def boxes(*rows):
    return np.array(rows, float).reshape(-1, 4)


def response(answer, look=()):
    return Response("t", None if look is None else boxes(*look), None if answer is None else boxes(*answer), True)


# ------------------------------------------------------------------------------------------------------------
# Parsing: no completion crashes it, none gets more credit than it should


@pytest.mark.parametrize("text", [
    "[[1, 2, 3, 4], [5, 6, 7.5, 8]]",
    '[{"bbox_2d": [1, 2, 3, 4], "label": "person"}, {"bbox_2d": [5, 6, 7.5, 8]}]',
    '[{"label": "a, [1, 2]", "bbox_2d": [1, 2, 3, 4]}, [5, 6, 7.5, 8]]',
    '```json\n[\n  {"bbox_2d": [1, 2, 3, 4], "label": "a"},\n  {"bbox_2d": [5, 6, 7.5, 8], "label": "b"}\n]\n```',
    "```\n[[1,2,3,4],[5,6,7.5,8]]```",
])
def test_boxes_parse_bare_in_qwens_form_and_fenced(text):
    assert dipr1.parse_boxes(text).tolist() == [[1, 2, 3, 4], [5, 6, 7.5, 8]]


def test_an_empty_list_is_not_an_unparseable_one():
    assert dipr1.parse_boxes(" [ ] ").shape == (0, 4)
    assert dipr1.parse_boxes("") is None


@pytest.mark.parametrize("text", [
    "[[1, 2, 3]]", "[[1, 2, 3, 4]", "[1, 2, 3, 4]", "[[1, 2, 3, 4],]", "[,[1, 2, 3, 4] [1, 2, 3, 4]]",
    "[[1, 2, 3, NaN]]", "[[1, 2, 3, Infinity]]", "[[1, 2, 3, " + "9" * 400 + "]]", "[[1 2, 3, 4, 5]]",
    '[{"bbox_2d": [1, 2, 3, 4]]', '{"bbox_2d": [1, 2, 3, 4]}', "[[1, 2, 3, 4]] and more",
    "[[__import__('os'), 2, 3, 4]]", "[[1e9, 2, 3, 4]]",
    '```json\n[[1, 2, 3, 4]]', "[[[1, 2, 3, 4]]]",
])
def test_what_is_not_a_list_of_boxes_is_none(text):
    assert dipr1.parse_boxes(text) is None
    assert dipr1.format_reward(completion(answer=text)) == 0
    assert dipr1.format_reward(completion(look=text)) == 0


def test_format_reward_wants_the_whole_template_and_nothing_else():
    good = completion()
    assert dipr1.format_reward(good) == 1
    assert dipr1.format_reward(f"\n {good.replace('><', '> <')} \n") == 1
    assert dipr1.format_reward(completion(look="[]", answer="[]")) == 1
    for bad in (good + "x", "x" + good, good + good, good.replace("<think>", "", 1), completion(think=" \n"),
                good.replace("</look>", "</look>x"), good.replace("look", "LOOK"), good[:-1], good + "<answer>",
                "<answer>[]</answer><look>[]</look><think>t</think>", good + "<|im_start|>", ""):
        assert dipr1.format_reward(bad) == 0, bad


def test_a_right_answer_in_a_broken_frame_is_still_read_but_an_ambiguous_one_is_not():
    assert dipr1.parse_response("hm <answer>[[1, 2, 3, 4]]</answer>").answer.tolist() == [[1, 2, 3, 4]]
    assert dipr1.parse_response("<answer>[[1, 2, 3, 4]]</answer><answer>[]</answer>").answer is None
    assert dipr1.parse_response("</answer>[[1, 2, 3, 4]]<answer>").answer is None
    assert dipr1.parse_response("<answer>[<look>]</answer>").answer is None


GARBAGE = {
    "nothing": "",
    "noise": "".join(map(chr, np.random.default_rng(0).integers(1, 0x2FFF, 20000))),
    "truncated": completion()[:-12],
    "nested": completion(answer="[" * 10000 + "]" * 10000),
    "nested objects": completion(answer='{"bbox_2d":' * 10000),
    "long number": completion(answer=f"[[{'7' * 400}, 1, 2, 3]]"),
    "nan": completion(answer="[[NaN, 1, 2, 3]]"),
    "repeated": completion() * 500,
    "200 kB of a tag": "<think>" * 30000,
    "half boxes": completion(answer="[[1, 2, 3, 4" * 20000),
    "spaces": completion(answer="[" + " " * 200_000),
    "spaced": completion(answer="[[1" + " " * 50_000 + "," + " " * 50_000 + "2" + " " * 100_000),
    "labels": completion(answer='[{"label": "' * 20000),
    "keys": completion(answer='{"bbox_2d": [1, 2, 3, 4]' * 10000),
    "fences": completion(answer="```json" * 30000),
    "digits": completion(answer="[[" + "1" * 200_000),
    "nulls": "\0" * 1000,
    "surrogate": completion(answer="\ud800"),
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_is_parsed_in_no_time_and_never_rewarded(name):
    started = time.process_time()
    parsed = dipr1.parse_response(GARBAGE[name])
    reward = dipr1.format_reward(GARBAGE[name])
    assert time.process_time() - started < 0.2  # two parses
    assert reward == 0
    assert 0 <= dipr1.look_rewards([parsed, parsed, parsed], 56, 56).min()


def mutated(text, rng):
    """A completion with a few accidents: characters lost, doubled or exchanged, pieces moved, repeated or cut off."""
    tags = ["<think>", "</think>", "<look>", "</look>", "<answer>", "</answer>"]
    for _ in range(rng.integers(1, 6)):
        a, b = sorted(rng.integers(0, len(text) + 1, 2))
        text = [
            text[:a] + text[a + 1:], text[:a] + text[a:b] * 2 + text[b:], text[:a], text[:a] + text[b:],
            text[:a] + rng.choice(list('0123456789-.,[]{}"<>/ \\\n\0é')) + text[a + 1:],
            text[b:] + text[:a], text[:a] + rng.choice(tags) + text[a:], text[:a] + "9" * int(b - a) + text[b:],
        ][rng.integers(8)]
    return text


@pytest.mark.slow
def test_a_hundred_thousand_mutated_completions_earn_finite_rewards_within_bounds():
    rng, malformed, earned = np.random.default_rng(0), 0, 0
    truth, ignore = boxes([10, 10, 40, 60], [30, 12, 70, 66]), boxes([80, 0, 112, 30])
    qwen = '[{"bbox_2d": [9, 11, 41, 58], "label": "person"}, {"bbox_2d": [31, 12, 69, 66], "label": "person"}]'
    whole = [completion(), completion(answer=qwen), completion(look="[]", answer="```json\n" + qwen + "\n```"),
             completion(look="[[5, 5, 80, 80]]", answer="[[10, 10, 40.5, 60], [30, 12, 70, 66]]")]
    cases = [("dip-r1", "detection"), *(("perception-r1", task) for task in dipr1.TRUTH)]
    for number in range(12_500):
        method, task = cases[number % 5]
        from_texts = whole if method == "dip-r1" else ["<answer>" + text.split("<answer>")[1] for text in whole]
        texts = [mutated(from_texts[rng.integers(4)], rng) for _ in range(8)]
        of_task = truth[:1] if task == "grounding" else truth[:, :2] if task == "counting" else truth
        record = {"method": method, "task": task, "transcript": "[[12, 30]] and more"}
        prompt = SimpleNamespace(width=112, height=112, truth=of_task, ignore=ignore, record=record)
        rewards = dipr1.group_rewards(Group(prompt, [], texts=texts), 0.65)
        lowest = torch.tensor([0 if method == "dip-r1" else -1, 0, 0])
        assert rewards.shape == (8, 3) and bool(torch.isfinite(rewards).all())
        assert bool((rewards >= lowest).all() and (rewards <= 1).all()), texts
        malformed += (rewards[:, 0] <= 0).sum().item()
        earned += (rewards[:, 2] > 0).sum().item()
    assert malformed > 50_000 and earned > 5_000, "the accidents should be bad, and not all fatal"


# ------------------------------------------------------------------------------------------------------------
# Boxes and matching


def random_boxes(rng, n, size=20):
    corners = rng.integers(0, size, (n, 2, 2))
    return np.concatenate([corners.min(1), corners.max(1) + 1], axis=1).astype(float)


def test_iou_equals_counting_pixels():
    rng = np.random.default_rng(0)
    a, b = random_boxes(rng, 6), random_boxes(rng, 5)

    def pixels(box):
        return {(x, y) for x in range(int(box[0]), int(box[2])) for y in range(int(box[1]), int(box[3]))}

    naive = [[len(pixels(p) & pixels(q)) / len(pixels(p) | pixels(q)) for q in b] for p in a]
    assert np.allclose(dipr1.box_iou(a, b), naive)


def test_inverted_empty_and_outside_boxes_overlap_nothing():
    odd = dipr1.clip_boxes([[10, 10, 5, 5], [3, 3, 3, 9], [200, 200, 300, 300], [-50, -50, -10, -10]], 20, 20)
    assert (dipr1.box_iou(odd, boxes([0, 0, 20, 20])) == 0).all()
    assert dipr1.box_iou(boxes(), boxes([0, 0, 1, 1])).shape == (0, 1)


def brute_force_matching(iou, threshold):
    """The largest total IoU over all one-to-one pairings, by trying each."""
    if iou.shape[0] > iou.shape[1]:
        iou = iou.T
    worth = np.where(iou >= threshold, iou, 0)
    pairings = itertools.permutations(range(iou.shape[1]), iou.shape[0])
    return max(sum(worth[i, j] for i, j in enumerate(pairing)) for pairing in pairings)


def test_matching_equals_brute_force():
    rng = np.random.default_rng(1)
    for _ in range(200):
        gt = random_boxes(rng, rng.integers(1, 6))
        pred = np.concatenate([gt + rng.normal(0, 2, gt.shape), random_boxes(rng, 2)])[: rng.integers(1, 7)]
        rows, cols, ious = dipr1.match_boxes(pred, gt)
        assert len(set(rows)) == len(rows) and len(set(cols)) == len(cols) and (ious >= 0.5).all()
        assert np.isclose(ious.sum(), brute_force_matching(dipr1.box_iou(pred, gt), 0.5))


def test_matching_is_hungarian_where_greedy_would_lose_a_pair():
    gt = boxes([0, 0, 10, 10], [4, 0, 14, 10])
    pred = boxes([3, 0, 13, 10], [6, 0, 16, 10])  # the first fits both truths, the second only the other
    assert len(dipr1.match_boxes(pred, gt)[0]) == 2


# ------------------------------------------------------------------------------------------------------------
# Accuracy reward


TWO = boxes([0, 0, 10, 10], [20, 0, 30, 10])


@pytest.mark.parametrize("pred, gt, ignore, w, expected", [
    (TWO, TWO, None, 0.75, 1.0),
    (TWO[:1], TWO, None, 0.75, 0.25 * 1 + 0.75 * 0.5),
    (TWO[:1], TWO, None, 0.5, 0.75),
    (np.concatenate([TWO, boxes([50, 50, 60, 60])]), TWO, None, 0.75, 0.25 * 2 / 3 + 0.75),
    (boxes(), boxes(), None, 0.75, 1.0),
    (boxes(), TWO, None, 0.75, 0.0),
    (TWO, boxes(), None, 0.75, 0.0),
    (None, TWO, None, 0.75, 0.0),
    (TWO, TWO[:1], boxes([18, 0, 40, 40]), 0.75, 1.0),  # the second lies in an ignore region
    (TWO, TWO[:1], boxes([26, 0, 40, 40]), 0.75, 0.25 * 0.5 + 0.75),  # ... less than half of it
    (TWO, TWO, boxes([0, 0, 99, 99]), 0.75, 1.0),  # matched ones count, wherever they lie
    (TWO, boxes(), boxes([0, 0, 99, 99]), 0.75, 1.0),
])
def test_accuracy_reward_by_hand(pred, gt, ignore, w, expected):
    assert dipr1.accuracy_reward(pred, gt, ignore, recall_weight=w) == pytest.approx(expected)


def test_crowds_are_chains_of_overlap():
    row = [[10 * k, 0, 10 * k + 16, 20] for k in (0, 1, 2)]  # the first and the third do not touch
    alone, pair = [200, 0, 210, 20], [[100, 0, 120, 20], [105, 5, 120, 25]]
    mixed = boxes(row[2], pair[1], alone, row[0], pair[0], row[1])
    assert dipr1.crowded(mixed, 0.2).tolist() == [True, True, False, True, True, True]
    assert dipr1.crowds(mixed, 0.2).tolist() == [[0, 0, 36, 20], [100, 0, 120, 25]]
    assert len(dipr1.crowds(mixed, 0.9)) == len(dipr1.crowds(boxes(), 0.2)) == 0


def test_accuracy_hacks_earn_less_than_honesty():
    gt = boxes(*[[20 * i, 0, 20 * i + 15, 40] for i in range(5)])
    honest = dipr1.accuracy_reward(gt[:4], gt)
    assert honest == pytest.approx(0.35 + 0.65 * 0.8)
    duplicates = np.repeat(gt[:4], 5, axis=0)
    assert dipr1.accuracy_reward(duplicates, gt) == pytest.approx(0.35 * 0.2 + 0.65 * 0.8)
    assert dipr1.accuracy_reward(gt[:1], gt) == pytest.approx(0.35 + 0.65 * 0.2)  # one safe box
    assert dipr1.accuracy_reward(boxes(), gt) == 0  # empty answer
    assert dipr1.accuracy_reward(boxes([0, 0, 100, 40]), gt) == 0  # one box around everybody
    outside = np.concatenate([gt[:4], boxes([900, 900, 950, 950], [9, 9, 3, 3])])
    assert dipr1.accuracy_reward(outside, gt) < honest  # no free pass for boxes that are nowhere


def test_equal_weights_reward_dropping_a_doubtful_box_and_recall_weight_does_not():
    """The known trap, on a box that is right half of the time while four of five others are."""
    gt = boxes(*[[20 * i, 0, 20 * i + 15, 40] for i in range(6)])
    sure, wrong = gt[:4], boxes([500, 0, 515, 40])
    base = np.concatenate([sure, wrong])

    def gain(chance, w):
        right = dipr1.accuracy_reward(np.concatenate([base, gt[4:5]]), gt, recall_weight=w)
        missed = dipr1.accuracy_reward(np.concatenate([base, wrong + 100]), gt, recall_weight=w)
        return chance * right + (1 - chance) * missed - dipr1.accuracy_reward(base, gt, recall_weight=w)

    assert gain(0.35, 0.5) < 0 < gain(0.35, 0.75)


# ------------------------------------------------------------------------------------------------------------
# Look reward


def naive_look_reward(i, responses, width, height):
    """The definition, a cell and a completion at a time."""
    def covers(box, x, y):
        return box[0] <= x <= box[2] and box[1] <= y <= box[3]

    others = [r.answer for j, r in enumerate(responses) if j != i and r.answer is not None]
    if responses[i].look is None or len(others) < 2:
        return 0.0
    both = looks = unsure = 0.0
    for y in range(7, height, 14):
        for x in range(7, width, 14):
            counts = [sum(covers(box, x, y) for box in answer) for answer in others]
            mean = sum(counts) / len(counts)
            u = min(1.0, 4 * sum((c - mean) ** 2 for c in counts) / len(counts))
            look = float(any(covers(box, x, y) for box in responses[i].look))
            both, looks, unsure = both + look * u, looks + look, unsure + u
    return 2 * both / (looks + unsure) if unsure else 0.0


def test_look_rewards_equal_the_definition():
    rng = np.random.default_rng(2)
    for _ in range(30):
        responses = []
        for _ in range(rng.integers(2, 8)):
            look, answer = (random_boxes(rng, rng.integers(0, 4), 80) for _ in range(2))
            responses.append(Response("t", *(None if rng.random() < 0.15 else b for b in (look, answer)), True))
        rewards = dipr1.look_rewards(responses, 84, 56)
        assert np.allclose(rewards, [naive_look_reward(i, responses, 84, 56) for i in range(len(responses))])
        assert ((0 <= rewards) & (rewards <= 1)).all()


PERSON, OTHER, PLACE = [0, 0, 28, 56], [56, 0, 84, 56], [0, 0, 27, 55]  # the two others split over OTHER


def test_look_reward_by_hand():
    split = [response([PERSON]), response([PERSON, OTHER])]
    assert dipr1.look_rewards([response([], [OTHER])] + split, 112, 112)[0] == 1  # exactly the doubtful person
    assert dipr1.look_rewards([response([], [PERSON])] + split, 112, 112)[0] == 0  # the person all agree on
    assert dipr1.look_rewards([response([], [])] + split, 112, 112)[0] == 0
    half = response([], [[56, 0, 84, 28]])
    assert dipr1.look_rewards([half] + split, 112, 112)[0] == pytest.approx(2 * 4 / (4 + 8))
    assert dipr1.look_rewards([response([], None)] + split, 112, 112)[0] == 0


def test_one_box_over_two_people_disagrees_with_a_box_for_each():
    """Merging individuals is what the paper is about: a mask of covered cells would see no difference here."""
    merged, apart = [[0, 0, 56, 56]], [[0, 0, 42, 56], [14, 0, 56, 56]]
    counts = [dipr1.coverage(boxes(*answer), 112, 112) for answer in (merged, apart)]
    assert ((counts[0] > 0) == (counts[1] > 0)).all() and dipr1.disagreement(counts).sum() > 0


def test_look_hacks_earn_little():
    split = [response([PERSON]), response([PERSON, OTHER])]
    rewards = lambda look: dipr1.look_rewards([response([], look)] + split, 112, 112)[0]
    assert rewards([[0, 0, 112, 112]]) == pytest.approx(2 * 8 / (64 + 8))  # the whole image: 0.22
    assert rewards([OTHER] * 50) == rewards([OTHER]) == 1  # duplicates change nothing
    # Being the outlier does not manufacture what one is paid for: the others agree, so there is nothing to find.
    outlier = response([[84, 84, 112, 112]], [[84, 84, 112, 112]])
    assert dipr1.look_rewards([outlier, response([PERSON]), response([PERSON])], 112, 112)[0] == 0
    unparsed = [response(None, [OTHER]), response(None), response([PERSON], [OTHER])]
    assert (dipr1.look_rewards(unparsed, 112, 112) == 0).all()  # fewer than two other answers cannot disagree


def test_the_best_look_is_the_cells_above_half_the_best_score():
    u = np.random.default_rng(3).random(9)
    looks = [look for n in range(10) for look in itertools.combinations(range(9), n)]
    score = {look: 2 * u[list(look)].sum() / (len(look) + u.sum()) for look in looks}
    best = max(score, key=score.get)
    assert set(best) == set(np.flatnonzero(u > score[best] / 2))


# ------------------------------------------------------------------------------------------------------------
# Perception-R1's rewards: by hand, by brute force, and what known hacks earn


def prompt_of(task, truth=(), **fields):
    """What the rewards need of a prompt: an image of 100 x 100 pixels."""
    record = {"method": "perception-r1", "task": task, "target": "person"} | fields
    return SimpleNamespace(width=100, height=100, truth=np.array(truth, float), ignore=boxes(), record=record)


def perceived(task, answer, truth=(), **fields):
    return dipr1.perception_rewards(f"<answer>{answer}</answer>", prompt_of(task, truth, **fields))


@pytest.mark.parametrize("task, truth, answer, reward", [
    ("grounding", [[0, 0, 10, 10]], "[[0, 0, 10, 10]]", 1), ("grounding", [[0, 0, 10, 10]], "[[0, 0, 10, 5]]", 0.5),
    ("grounding", [[0, 0, 10, 10]], "[[0, 0, 10, 10], [0, 0, 10, 10]]", 0), ("grounding", [[0, 0, 10, 10]], "[]", 0),
    ("counting", [[0, 0], [100, 100]], "[[0, 0], [100, 100]]", 1), ("counting", [[0, 0]], "[[100, 100]]", 0),
    ("counting", [[0, 0], [100, 100]], "[[100, 100]]", 0.5), ("counting", [[0, 0]], "[[50, 50]]", 0.5),
    ("counting", [[0, 0]], "[[0, 0], [0, 0]]", 0.5), ("counting", [[0, 0]], "[]", 0),
    ("counting", np.zeros((0, 2)), "[]", 1), ("counting", np.zeros((0, 2)), "[[1, 1]]", 0),
    ("counting", [[0, 0]], '[{"point_2d": [0, 0], "label": "person"}]', 1), ("counting", [[0, 0]], "[[9999, 9999]]", 0),
    ("detection", [[0, 0, 10, 10], [50, 50, 60, 60]], "[[50, 50, 60, 60], [0, 0, 10, 5]]", 0.75),
    ("detection", [[0, 0, 10, 10]], "[[0, 0, 10, 10], [90, 90, 99, 99]]", 0.5),
    ("detection", np.zeros((0, 4)), "[]", 1),
    ("detection", [[0, 0, 10, 10]], "[]", 0), ("detection", np.zeros((0, 4)), "[[1, 1, 2, 2]]", 0),
    ("detection", [[0, 0, 10, 10]], "[[10, 10, 0, 0]]", 0),
    ("detection", [[90, 90, 100, 100]], "[[90, 90, 900, 900]]", 1),
])
def test_answer_rewards_by_hand(task, truth, answer, reward):
    assert perceived(task, answer, truth) == (1, pytest.approx(reward))


def test_ocr_reward_by_hand():
    for answer, reward in (("kitten", 1), (" kitten\n", 1), ("sitting", 1 - 3 / 7), ("", 0), ("kitte", 5 / 6)):
        assert perceived("ocr", answer, transcript="kitten") == (1, pytest.approx(reward))
    assert perceived("ocr", "", transcript="") == (1, 1) and perceived("ocr", "x", transcript="") == (1, 0)


def test_perceptions_format_is_one_or_minus_one():
    truth = [[0, 0, 10, 10]]
    for text, rewards in (("<answer>[[0, 0, 10, 10]]</answer>", (1, 1)), ("\n <answer>[]</answer> ", (1, 0)),
                          ("<answer>nobody</answer>", (-1, 0)), ("", (-1, 0)), ("[[0, 0, 10, 10]]", (-1, 0)),
                          ("<think>hm</think><answer>[[0, 0, 10, 10]]</answer>", (-1, 1)),
                          ("<answer>[]</answer><answer>[]</answer>", (-1, 0)), ("</answer>[]<answer>", (-1, 0))):
        assert dipr1.perception_rewards(text, prompt_of("detection", truth)) == rewards, text


def test_labels_that_differ_pair_nobody():
    truth, labels = [[0, 0, 10, 10], [50, 50, 60, 60]], ["dog", "cat"]
    rows = [{"bbox_2d": box, "label": label} for box, label in zip(truth, labels)]
    assert perceived("detection", json.dumps(rows), truth, labels=labels) == (1, 1)
    assert perceived("detection", json.dumps(rows[::-1]), truth, labels=labels) == (1, 1)
    rows[0]["label"] = "cat"
    assert perceived("detection", json.dumps(rows), truth, labels=labels) == (1, 0.5)
    assert perceived("detection", str(truth), truth, labels=labels) == (1, 0)  # bare boxes name nothing
    mixed = f'[{truth[0]}, {json.dumps(rows[1])}]'  # whose label is it?
    assert perceived("detection", mixed, truth, labels=labels) == (1, 0)
    assert perceived("detection", "[]", truth, labels=labels) == (1, 0)
    assert perceived("detection", "[]", boxes(), labels=[]) == (1, 1)
    prompt = prompt_of("detection", truth, labels=labels)
    assert dipr1.perception_rewards(f"{rows}<answer>{json.dumps(rows[1:])}</answer>", prompt) == (-1, 0.5)
    assert "label" in dipr1.question(prompt.record)


def every_pairing(n, m):
    """All one-to-one pairings of as many as can be paired, as lists of (i, j)."""
    if n > m:
        return [[(i, j) for j, i in pairs] for pairs in every_pairing(m, n)]
    return [list(enumerate(chosen)) for chosen in itertools.permutations(range(m), n)]


def test_counting_and_detection_rewards_equal_trying_every_pairing():
    rng = np.random.default_rng(0)
    for _ in range(100):
        n, m = rng.integers(1, 5, 2).tolist()
        pred, truth = rng.uniform(-20, 130, (n, 2)), rng.uniform(0, 100, (m, 2))
        cost = lambda i, j: min(1, math.dist(pred[i], truth[j]) / math.hypot(100, 80))
        best = max(sum(1 - cost(i, j) for i, j in pairs) for pairs in every_pairing(n, m))
        assert dipr1.counting_reward(pred, truth, 100, 80) == pytest.approx(best / max(n, m))
        pred, truth = random_boxes(rng, n, 12), random_boxes(rng, m, 12)
        names, labels = rng.choice(["a", "b"], n).tolist(), rng.choice(["a", "b"], m).tolist()
        iou = dipr1.box_iou(pred, truth)
        for named in (False, True):
            worth = lambda i, j: iou[i, j] * (not named or names[i] == labels[j])
            best = max(sum(worth(i, j) for i, j in pairs) for pairs in every_pairing(n, m))
            given = (names, labels) if named else ()
            assert dipr1.detection_reward(pred, truth, None, *given) == pytest.approx(best / max(n, m))


def naive_levenshtein(a, b):
    """The textbook's table."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(previous[j] + 1, row[-1] + 1, previous[j - 1] + (x != y)))
    return row[-1]


def test_levenshtein_equals_the_table():
    rng = np.random.default_rng(0)
    for length in (0, 1, 2, 5, 30, 70, 130):
        for _ in range(30):
            a, b = ("".join(rng.choice(list("abcé"), rng.integers(0, length + 1))) for _ in range(2))
            assert dipr1.levenshtein(a, b) == naive_levenshtein(a, b) == dipr1.levenshtein(b, a)
    page = "".join(rng.choice(list("abcdefgh "), 3000))
    assert dipr1.levenshtein(page, page[:1000] + "?" + page[1001:] + "!") == 2


def test_what_known_hacks_earn():
    """Against four people and an honest answer that is a fifth off: .67 for boxes, .97 for points."""
    truth = [[10, 10, 30, 50], [25, 12, 45, 52], [50, 40, 70, 90], [75, 20, 95, 70]]
    middles = [[20, 30], [35, 32], [60, 65], [85, 45]]
    shifted = [[x1 + 4, y1, x2 + 4, y2] for x1, y1, x2, y2 in truth]
    detect = lambda answer: perceived("detection", answer, truth)[1]
    count = lambda answer: perceived("counting", answer, middles)[1]
    ground = lambda answer: perceived("grounding", answer, truth[:1])[1]
    honest = detect(shifted)
    assert honest == pytest.approx(2 / 3)
    rng = np.random.default_rng(0)
    extra = random_boxes(rng, 300, 99).tolist()
    assert detect(truth + extra) < 0.02 and detect(truth * 2) == 0.5 and detect(truth * 10) == pytest.approx(0.1)
    assert detect("[]") == 0 and detect([[0, 0, 100, 100]]) < 0.03 and detect([[0, 0, 100, 100]] * 4) < 0.11
    assert detect([truth[0]]) == 0.25 < honest
    assert count([[x + 4, y] for x, y in middles]) > 0.97
    assert count([[50, 50]] * 400) < 0.02 and count([[50, 50]]) < 0.25
    assert count(middles * 2) == 0.5 and count("[]") == 0
    assert count([[-900, -900]] * 4) == 0
    in_one_place = count([[50, 50]] * 4)  # the weak spot of the definition: a right count, wherever it points
    assert in_one_place == pytest.approx(0.8, abs=0.005) and in_one_place < count([[x + 10, y] for x, y in middles])
    assert ground([[0, 0, 100, 100]]) == pytest.approx(0.08) and ground(truth[:1] * 2) == 0 == ground("[]")
    assert perceived("ocr", "the " * 400, transcript="the cat")[1] < 0.01


# ------------------------------------------------------------------------------------------------------------
# Advantages and loss


def test_advantages_equal_the_formula_and_vanish_where_all_agree():
    rewards = torch.tensor([[0.0, 1.0, 2.0, 5.0], [0.1, 0.1, 0.1, 0.1]], dtype=torch.float64)
    row = [0.0, 1.0, 2.0, 5.0]
    std = math.sqrt(sum((r - 2) ** 2 for r in row) / 3)
    naive = torch.tensor([(r - 2) / (std + 1e-4) for r in row], dtype=torch.float64)
    assert torch.allclose(dipr1.group_advantages(rewards)[0], naive)
    for value in (0.1, 1 / 3, 0.7, 1e9):
        assert (dipr1.group_advantages(torch.full((3, 7), value)) == 0).all()  # exactly: rounding must not teach
    assert (dipr1.group_advantages(torch.tensor([[0.3]])) == 0).all()


def naive_loss_and_gradient(logp, old, ref, advantage, eps, beta):
    """The objective in float64, a token at a time, with its derivative written out by hand."""
    loss, gradient = 0.0, []
    for i, (lp, lo, a) in enumerate(zip(logp, old, advantage)):
        rho = math.exp(lp - lo)
        clipped = min(max(rho, 1 - eps), 1 + eps)
        surrogate = min(rho * a, clipped * a)
        slope = -rho * a if rho * a <= clipped * a else 0.0
        if ref is not None:
            d = ref[i] - lp
            surrogate -= beta * (math.exp(d) - d - 1)
            slope += beta * (1 - math.exp(d))
        loss -= surrogate
        gradient.append(slope / len(logp))
    return loss / len(logp), gradient


@pytest.mark.parametrize("with_kl", [False, True])
def test_loss_and_gradient_equal_the_formula(with_kl):
    ratios = [0.5, 0.79, 0.9, 1.0, 1.1, 1.21, 2.0]  # inside and outside the clip, for both signs of the advantage
    old = torch.full((14,), -1.3, dtype=torch.float64)
    logp = (old + torch.tensor(ratios * 2, dtype=torch.float64).log()).requires_grad_()
    ref = old + torch.linspace(-2, 2, 14, dtype=torch.float64) if with_kl else None
    advantage = torch.tensor([1.7] * 7 + [-0.6] * 7, dtype=torch.float64)
    loss, stats = dipr1.grpo_loss(logp, old, ref, advantage, clip_eps=0.2, beta=0.3)
    loss.backward()
    lists = [None if x is None else x.tolist() for x in (logp, old, ref, advantage)]
    naive, gradient = naive_loss_and_gradient(*lists, eps=0.2, beta=0.3)
    assert loss.item() == pytest.approx(naive, abs=1e-12)
    assert torch.allclose(logp.grad, torch.tensor(gradient, dtype=torch.float64), atol=1e-12)
    assert stats["clip_fraction"] == pytest.approx(4 / 14)  # 1.21 and 2.0 where A > 0; 0.5 and 0.79 where A < 0


def test_on_policy_the_kl_still_has_a_gradient_off_the_reference():
    """k1 = log pi - log pi_ref would have none in expectation; k3's is 1 - pi_ref / pi for each token."""
    logp = torch.tensor([-1.0, -2.0], requires_grad=True)
    loss, _ = dipr1.grpo_loss(logp, logp.detach(), torch.tensor([-2.0, -1.0]), torch.zeros(2), 0.2, 1.0)
    loss.backward()
    assert torch.allclose(logp.grad, torch.tensor([(1 - math.exp(-1)) / 2, (1 - math.exp(1)) / 2]))


def test_an_abandoned_token_gives_a_large_number_not_infinity():
    logp = torch.tensor([-1e4], requires_grad=True)
    loss, _ = dipr1.grpo_loss(logp, torch.tensor([-1.0]), torch.tensor([-1.0]), torch.tensor([-1.0]), 0.2, 0.04)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logp.grad).all()


# ------------------------------------------------------------------------------------------------------------
# The model: a packed group against the plain way


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A tiny Qwen2.5-VL on disk with six images of several sizes: (folder of the model, JSONL)."""
    folder = tmp_path_factory.mktemp("tiny")
    data_prep.tiny(folder / "model")
    rng, records = np.random.default_rng(0), []
    for number, (width, height) in enumerate([(112, 112), (168, 84), (70, 150), (112, 112), (300, 40), (56, 56)]):
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        records.append({"image": f"{number}.png", "width": width, "height": height, "target": "person",
                        "boxes": [[5, 5, 30, 35], [20, 10, 45, 38], [1, 1, 9, 12]][: number % 4], "ignore": []})
    data_prep.write_jsonl(folder / "train.jsonl", records)
    return folder / "model", folder / "train.jsonl"


def load(tiny, **options):
    """A fresh (policy, encoder, prompts) of the tiny checkpoint, weights scaled up so that it has opinions."""
    cfg = Config(model=str(tiny[0]), **options)
    model, tokenizer, image_processor = dipr1.load_model(cfg, torch.device("cpu"))
    encoder = dipr1.Encoder(model, tokenizer, image_processor)
    prompts = [encoder.prompt(index, record) for index, record in enumerate(dipr1.load_records(tiny[1]))]
    return dipr1.Policy(model, tokenizer, cfg.temperature), encoder, prompts


def random_group(prompt, lengths=(5, 9, 1, 7), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Group(prompt, [torch.randint(300, 400, (n,), generator=generator) for n in lengths])


def plain_logprobs(policy, group):
    """What a careful user of transformers writes: a padded row a completion, each with a copy of the image, and
    logits for the completions only."""
    prompt, longest = group.prompt, max(map(len, group.completions))
    rows = [torch.cat([prompt.ids, o, o.new_zeros(longest - len(o))]) for o in group.completions]
    ids, G = torch.stack(rows), len(rows)
    lengths = torch.tensor([len(prompt.ids) + len(o) for o in group.completions], device=ids.device)
    logits = policy.model(
        input_ids=ids, attention_mask=(torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]).long(),
        pixel_values=prompt.pixels.repeat(G, 1), image_grid_thw=prompt.grid.repeat(G, 1),
        mm_token_type_ids=(ids == policy.model.config.image_token_id).int(), logits_to_keep=longest + 1,
    ).logits.float() / policy.temperature
    logits[..., policy.forbidden < 0] = -float("inf")
    logp = logits.log_softmax(-1)
    return torch.cat([logp[i, torch.arange(len(o)), o] for i, o in enumerate(group.completions)])


@pytest.mark.parametrize("temperature, checkpointing", [(1.0, False), (0.7, True)])
def test_packed_groups_equal_one_padded_forward_a_completion(tiny, temperature, checkpointing):
    """Log-probabilities and all gradients, for images of different aspect in one batch of rows."""
    policy, _, prompts = load(tiny, temperature=temperature, gradient_checkpointing=checkpointing)
    policy.train()
    groups = [random_group(prompts[0]), random_group(prompts[1], (3, 12), seed=1)]
    weight = torch.linspace(-1, 1, sum(group.n_tokens for group in groups))

    packed = policy(groups)
    (packed * weight).sum().backward()
    ours = {name: p.grad.clone() for name, p in policy.named_parameters()}
    policy.zero_grad()
    plain = torch.cat([plain_logprobs(policy, group) for group in groups])
    (plain * weight).sum().backward()
    assert torch.allclose(packed, plain, atol=1e-5)
    for name, parameter in policy.named_parameters():
        assert torch.allclose(ours[name], parameter.grad, atol=1e-5, rtol=1e-4), name
        assert parameter.grad.abs().max() > 0 or "k_proj.bias" in name, name


def test_completions_do_not_see_each_other(tiny):
    policy, _, prompts = load(tiny)
    group = random_group(prompts[1])
    changed = Group(prompts[1], [group.completions[0] + 7, *group.completions[1:]])
    with torch.no_grad():
        a, b = policy([group]).split([5, 17])[1], policy([changed]).split([5, 17])[1]
    assert torch.equal(a, b)


def test_chunks_of_the_vocabulary_softmax_change_nothing(tiny):
    """Forward and gradients against autograd over the whole log-softmax, in double precision."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias, grad = (torch.randn(shape, dtype=torch.double, generator=generator, requires_grad=True)
                                  for shape in ((23, 8), (40, 8), (40,), (23,)))
    targets = torch.randint(0, 40, (23,), generator=generator)
    plain = (hidden @ weight.T + bias).log_softmax(-1)[torch.arange(23), targets]
    expected = [plain, *torch.autograd.grad(plain, (hidden, weight), grad)]
    for chunk in (4, 23, 99):
        ours = dipr1.TokenLogprobs.apply(hidden, weight, bias, targets, chunk)
        for a, b in zip([ours, *torch.autograd.grad(ours, (hidden, weight), grad)], expected):
            assert torch.allclose(a.double(), b, atol=1e-5)


def test_positions_are_three_dimensional(tiny):
    """Without token types transformers silently counts 0, 1, 2, ... through the picture."""
    policy, _, prompts = load(tiny)
    prompt = prompts[1]
    _, row, column = prompt.positions
    image = prompt.ids == policy.model.config.image_token_id
    rows, columns = prompt.height // 28, prompt.width // 28
    assert (row[image] - row[image][0]).tolist() == [r for r in range(rows) for _ in range(columns)]
    assert (column[image] - column[image][0]).tolist() == list(range(columns)) * rows


def test_boxes_travel_to_model_space_with_a_scale_for_each_axis(tiny):
    grid = torch.tensor([[1, 728 // 14, 1316 // 14]])
    there = dipr1.to_model_space([[0, 0, 1920, 1080], [960, 540, 1920, 1080]], (1920, 1080), grid)
    assert there.tolist() == [[0, 0, 1316, 728], [658, 364, 1316, 728]]
    assert np.allclose(dipr1.to_image_space(there, (1920, 1080), grid), [[0, 0, 1920, 1080], [960, 540, 1920, 1080]])
    _, _, prompts = load(tiny)
    wide = prompts[4]  # 300 x 40
    assert (wide.width, wide.height) == (308, 28) or wide.width * wide.height >= 56 * 56
    assert wide.pixels.shape[0] == (wide.width // 14) * (wide.height // 14)


def test_our_chat_is_the_checkpoints_chat_template(tiny):
    _, encoder, _ = load(tiny)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "who?"}]}]
    template = encoder.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert dipr1.CHAT.format(question="who?") == template


def test_any_text_survives_the_tiny_tokenizer(tiny):
    _, encoder, _ = load(tiny)
    for text in (completion(answer="[[1, 22, 112, 1234]]"), "Grüße, 你好 \n\t  <thin", "12, 3,4 ], [ [["):
        assert encoder.tokenizer.decode(encoder.tokenizer(text, add_special_tokens=False).input_ids) == text


# ------------------------------------------------------------------------------------------------------------
# Rollout: what is sampled is what is scored


def test_rollout_logprobs_equal_scored_ones(tiny):
    policy, encoder, prompts = load(tiny, temperature=0.9)
    uniforms = torch.stack([dipr1.draw_uniforms(0, 0, p.index, (3, 20)) for p in prompts])
    for _ in range(2):  # also with other weights: no packed copy outlives its rollout
        groups = dipr1.rollout(policy, encoder, prompts, 20, uniforms)
        with torch.no_grad():
            scored = policy(groups)
            assert torch.allclose(torch.cat([group.rollout_logp for group in groups]), scored, atol=1e-4)
            for weight in policy.parameters():
                weight *= 1.2


@pytest.mark.parametrize("frozen, has_mkl", [(False, True), (True, True), (False, False)])
def test_the_rollout_writes_what_a_naive_loop_writes_token_for_token(tiny, monkeypatch, frozen, has_mkl):
    """No cache, no shared prompt, no dropped rows, no decoder of our own: the whole row anew for every token. Nor
    do features computed beforehand make a difference, as with a frozen tower, nor weights packed by MKL."""
    policy, encoder, prompts = load(tiny, temperature=0.9)
    if not has_mkl:
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    with torch.no_grad():
        noise = torch.randn(128, generator=torch.Generator().manual_seed(0))
        policy.model.lm_head.weight[encoder.eos[1]] += 0.2 * noise  # now and then an EOS: rows are dropped
        if frozen:
            dipr1.keep_features(policy, prompts[:2])
        uniforms = torch.stack([dipr1.draw_uniforms(0, 0, p.index, (4, 60)) for p in prompts[:2]])
        groups = dipr1.rollout(policy, encoder, prompts[:2], 60, uniforms)
        for group, of_group in zip(groups, uniforms):
            for completion, of_completion in zip(group.completions, of_group):
                written = []
                while len(written) < 60 and not set(written) & set(encoder.eos):
                    ids = torch.cat([group.prompt.ids, torch.tensor(written, dtype=torch.long)])[None]
                    logits = policy.model(
                        input_ids=ids, pixel_values=group.prompt.pixels, image_grid_thw=group.prompt.grid,
                        mm_token_type_ids=(ids == encoder.image_token).int(), use_cache=False).logits[:, -1] / 0.9
                    logits[:, policy.forbidden < 0] = -1e4
                    uniform = of_completion[None, len(written)]
                    written.append(dipr1.inverse_cdf(logits.log_softmax(-1), uniform).item())
                assert completion.tolist() == written
    assert 1 < len({len(o) for group in groups for o in group.completions})


def test_sampling_depends_on_seed_step_and_prompt_and_on_nothing_else(tiny):
    policy, encoder, prompts = load(tiny)

    def sample(prompts, step=3, seed=5):
        uniforms = torch.stack([dipr1.draw_uniforms(seed, step, p.index, (4, 12)) for p in prompts])
        groups = dipr1.rollout(policy, encoder, prompts, 12, uniforms)
        return {group.prompt.index: [o.tolist() for o in group.completions] for group in groups}

    together = sample(prompts)
    alone = {}
    for prompt in reversed(prompts):
        alone |= sample([prompt])
    assert together == alone
    assert sample(prompts[:1], step=4)[0] != together[0] != sample(prompts[:1], seed=6)[0]
    assert len({tuple(o) for o in together[0]}) == 4
    draws = [dipr1.draw_uniforms(*key, (2, 3)) for key in ((5, 3, 0), (6, 3, 0), (5, 4, 0), (5, 3, 1))]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(draws, 2))


def test_inverse_cdf_draws_the_distribution_and_never_an_impossible_token():
    p = torch.tensor([0.0, 0.5, 0.0, 0.125, 0.375, 0.0])
    uniforms = torch.arange(8000) / 8000
    drawn = dipr1.inverse_cdf(p.log().clamp(min=-1e4).expand(8000, -1), uniforms)
    assert torch.allclose(torch.bincount(drawn, minlength=6) / 8000, p, atol=1e-3)
    edges = dipr1.inverse_cdf(p.log().clamp(min=-1e4).expand(2, -1), torch.tensor([0.0, 1 - 2**-24]))
    assert edges.tolist() == [1, 4]


def test_placeholders_are_never_sampled_and_cost_nothing_to_forbid(tiny):
    """The policy may love <|image_pad|>: neither sampler nor scorer gives it a chance."""
    policy, encoder, prompts = load(tiny)
    with torch.no_grad():  # push every hidden state towards the placeholder
        policy.model.lm_head.weight[policy.model.config.image_token_id] *= 1000
    groups = dipr1.rollout(policy, encoder, prompts[:2], 20, torch.rand(2, 4, 20))
    assert policy.model.config.image_token_id not in torch.cat([o for g in groups for o in g.completions])
    hidden, every = torch.randn(1, 128), torch.arange(len(policy.forbidden))
    scored = dipr1.TokenLogprobs.apply(*policy.head(hidden.expand(len(every), -1)), every).exp()
    assert scored.sum().item() == pytest.approx(1, abs=1e-5) and (scored[policy.forbidden < 0] == 0).all()


def test_a_completion_ends_with_its_first_eos_which_belongs_to_it(tiny):
    policy, encoder, prompts = load(tiny)
    with torch.no_grad():
        noise = torch.randn(128, generator=torch.Generator().manual_seed(0))
        policy.model.lm_head.weight[encoder.eos[1]] += 0.2 * noise  # now and then an EOS
    uniforms = torch.stack([dipr1.draw_uniforms(0, 0, p.index, (8, 200)) for p in prompts[:2]])
    groups = dipr1.rollout(policy, encoder, prompts[:2], 200, uniforms)
    completions = [o.tolist() for g in groups for o in g.completions]
    assert len(encoder.eos) == 2 and any(o[-1] in encoder.eos for o in completions)
    for o in completions:
        assert not set(o[:-1]) & set(encoder.eos)
        assert o[-1] in encoder.eos or len(o) == 200


class FakeGraph:
    """A CUDA graph played on a CPU: a replay runs the recorded step again, on the same memory."""

    current = None

    @contextlib.contextmanager
    def recording(self):
        FakeGraph.current = self
        yield
        FakeGraph.current = None

    def watch(self, step):
        def run(*places):
            logprobs = step(*places)
            if FakeGraph.current:
                FakeGraph.current.replay = lambda: logprobs.copy_(step(*places))
            return logprobs
        return run


@pytest.mark.parametrize("cuda_works", [True, False])
def test_a_captured_decode_step_writes_the_same_tokens(tiny, monkeypatch, cuda_works):
    """The copying in and out and recording anew for fewer rows are real, CUDA's part is played.
    Where CUDA does not work at all (here, for example) there is a warning, and the same tokens again."""
    policy, encoder, prompts = load(tiny)
    uniforms = torch.rand(2, 4, 24, generator=torch.Generator().manual_seed(0))
    expected = dipr1.rollout(policy, encoder, prompts[:2], 24, uniforms)
    plain = dipr1.decode_step

    def capturing(policy, cache):  # as `rollout` does on a GPU, but on first use
        step, recorded = FakeGraph().watch(plain(policy, cache)), []

        def run(*inputs):
            if not recorded:
                recorded.append(dipr1.captured(step, *inputs))
            return recorded[0](*inputs)
        return run

    monkeypatch.setattr(dipr1, "decode_step", capturing)
    if cuda_works:
        stream = SimpleNamespace(wait_stream=lambda other: None)
        for name, played in (("Stream", lambda: stream), ("current_stream", lambda: stream), ("CUDAGraph", FakeGraph),
                             ("stream", contextlib.nullcontext), ("graph", FakeGraph.recording)):
            monkeypatch.setattr(torch.cuda, name, played)
    with contextlib.nullcontext() if cuda_works else pytest.warns(UserWarning, match="not captured as a CUDA graph"):
        groups = dipr1.rollout(policy, encoder, prompts[:2], 24, uniforms)
    for a, b in zip(expected, groups):
        assert all(torch.equal(x, y) for x, y in zip(a.completions, b.completions, strict=True))
        assert torch.equal(a.rollout_logp, b.rollout_logp)


def test_greedy_takes_the_likeliest_token_every_time(tiny):
    policy, encoder, prompts = load(tiny)
    (group,) = dipr1.rollout(policy, encoder, prompts[1:2], 6)
    written = []
    for _ in group.completions[0]:  # the naive way: score every token of the vocabulary as a completion
        candidates = [torch.tensor(written + [v]) for v in range(len(encoder.tokenizer))]
        with torch.no_grad():
            last = policy([Group(prompts[1], candidates)]).view(len(candidates), -1)[:, -1]
        written.append(int(last.argmax()))
    assert group.completions[0].tolist() == written


def test_a_stray_special_token_breaks_the_format(tiny):
    _, encoder, _ = load(tiny)
    ids = encoder.tokenizer(completion(), add_special_tokens=False).input_ids
    assert dipr1.format_reward(encoder.decode(torch.tensor(ids + encoder.eos[:1]))) == 1
    assert dipr1.format_reward(encoder.decode(torch.tensor(ids))) == 1  # cut right before its EOS
    stray = encoder.tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert dipr1.format_reward(encoder.decode(torch.tensor(ids + [stray] + encoder.eos[:1]))) == 0


# ------------------------------------------------------------------------------------------------------------
# Credit, targets, data


def test_the_look_reward_reaches_exactly_the_tokens_up_to_its_closing_tag(tiny):
    _, encoder, prompts = load(tiny)
    texts = [completion(look="[[0, 0, 28, 28]]"), completion(look="[]"), "never closes <look>"]
    tokens = [torch.tensor(encoder.tokenizer(t, add_special_tokens=False).input_ids) for t in texts]
    for o, text in zip(tokens, texts):
        n = encoder.look_length(o)
        assert "</look>" not in encoder.tokenizer.decode(o[: n - 1])
        assert ("</look>" in encoder.tokenizer.decode(o[:n])) == ("</look>" in text)
    group = Group(prompts[0], tokens, texts=texts)
    only_looks_differ = [[1.0, 0.9, 0.5], [1.0, 0.0, 0.5], [1.0, 0.2, 0.5]]
    rewards = torch.tensor([only_looks_differ], dtype=torch.float64)
    (advantage,) = dipr1.token_advantages(encoder, [group], rewards, Config(look_credit="section"))
    first = advantage[: len(tokens[0])]
    n = encoder.look_length(tokens[0])
    assert (first[:n] > 0).all() and (first[n:] == 0).all()
    (plain,) = dipr1.token_advantages(encoder, [group], rewards, Config(look_credit="completion"))
    assert (plain[: len(tokens[0])] == first[0]).all()


def test_the_supervised_target_is_a_perfect_completion(tiny):
    _, encoder, prompts = load(tiny)
    for prompt in prompts:
        text = encoder.decode(encoder.target(prompt))
        answer = dipr1.parse_response(text)
        assert dipr1.format_reward(text) == 1
        assert dipr1.accuracy_reward(answer.answer, prompt.truth) == 1
        assert (np.diff(answer.answer[:, 0]) >= 0).all()


def test_the_supervised_look_is_weak():
    """Around the two of three people who overlap three times in four, and as often as not somewhere else too."""
    truth, crowd = boxes([5, 5, 30, 35], [20, 10, 45, 38], [80, 80, 90, 99]), [5, 5, 45, 38]
    looks = [dipr1.weak_look(truth, 112, 56, seed) for seed in range(1000)]
    kept = [crowd in look.tolist() for look in looks]
    extra = [[box for box in look.tolist() if box != crowd] for look in looks]
    assert 0.7 < np.mean(kept) < 0.8 and 0.45 < np.mean([len(boxes) for boxes in extra]) < 0.55
    correlation = np.corrcoef(kept, [len(boxes) for boxes in extra])[0, 1]
    assert abs(correlation) < 0.1
    for x1, y1, x2, y2 in itertools.chain(*extra):
        assert 0 <= x1 < x2 <= 112 and 0 <= y1 < y2 <= 56
    assert all((np.diff(look[:, 0]) >= 0).all() for look in looks)
    assert (dipr1.weak_look(truth, 112, 56, 7) == looks[7]).all()


def test_every_epoch_takes_each_record_once_in_an_order_of_its_own():
    steps = [dipr1.batch_indices(10, 5, seed=0, step=s) for s in range(4)]
    assert sorted(steps[0] + steps[1]) == sorted(steps[2] + steps[3]) == list(range(10))
    assert steps[0] + steps[1] != steps[2] + steps[3]
    assert steps == [dipr1.batch_indices(10, 5, seed=0, step=s) for s in range(4)]
    assert len(dipr1.batch_indices(3, 8, seed=0, step=0)) == 8  # fewer records than a batch holds


@pytest.mark.parametrize("line", [
    "{", "[]", '{"image": "x.png"}', '{"image": "x.png", "width": 5, "height": 5, "boxes": [[1, 2]]}',
    '{"image": "x.png", "width": 0, "height": 5, "boxes": []}',
    '{"image": "x.png", "width": 5, "height": 5, "boxes": "[]"}',
    '{"image": "x.png", "width": 5, "height": 5, "boxes": [], "task": "singing"}',
    '{"image": "x.png", "width": 5, "height": 5, "boxes": [], "task": "ocr"}',
    '{"image": "x.png", "width": 5, "height": 5, "boxes": [], "method": "guessing"}',
    '{"image": 3, "width": 5, "height": 5, "boxes": []}',
    '{"image": "x.png", "width": 5, "height": 5, "boxes": [[1, 2, NaN, 4]]}',
])
def test_a_malformed_line_is_named_with_its_number(tmp_path, line):
    good = '{"image": "x.png", "width": 5, "height": 5, "target": "person", "boxes": []}'
    (tmp_path / "d.jsonl").write_text(f"{good}\n\n{line}\n")
    with pytest.raises(SystemExit, match="d.jsonl, line 3"):
        dipr1.load_records(tmp_path / "d.jsonl")


def test_a_broken_image_is_named(tiny, tmp_path):
    _, encoder, _ = load(tiny)
    whole = (tiny[1].parent / "0.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    record = {"width": 112, "height": 112, "target": "person", "boxes": [], "ignore": []}
    with pytest.raises(SystemExit, match="cut.png"):
        encoder.prompt(0, record | {"path": str(tmp_path / "cut.png")})
    with pytest.raises(SystemExit, match="0.png is .112, 112., but.*.50, 112."):  # no box would fit
        encoder.prompt(0, record | {"path": str(tiny[1].parent / "0.png"), "width": 50})


def test_the_image_of_a_prompt_that_is_too_long_is_scaled_down(tiny):
    """By Qwen's own rule, to sides that are multiples of 28; the boxes go with it."""
    _, encoder, prompts = load(tiny)
    record = prompts[0].record | {"boxes": [[0, 0, 112, 112], [28, 28, 84, 56]], "ignore": []}
    picture, text = Image.new("RGB", (112, 112)), len(encoder.chat(dipr1.question(record), 0, 0)[0])
    for room, side in ((100, 112), (16, 112), (15, 84), (9, 84), (8, 56), (4, 56)):
        encoder.max_prompt_tokens = text + room
        prompt = encoder.encode(0, record, picture)
        assert (prompt.width, prompt.height) == (side, side) and len(prompt.ids) <= text + room
        assert np.allclose(prompt.truth, np.array(record["boxes"]) * side / 112)
    encoder.max_prompt_tokens = text + 3
    with pytest.raises(SystemExit, match="leaves room for 3 visual tokens"):
        encoder.encode(0, record, picture)


@pytest.mark.parametrize("where, said", [
    ("rollout", "3 x 9 of completions.*--max_new_tokens"), ("forward", "27 of completions.*--groups_per_forward")])
def test_an_out_of_memory_names_the_image_the_lengths_and_what_to_lower(tiny, monkeypatch, where, said):
    policy, encoder, prompts = load(tiny)

    def full(*args):
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    monkeypatch.setattr(*((dipr1, "rollout", full) if where == "rollout" else (policy, "forward", full)))
    cfg, longest = Config(group_size=3, max_new_tokens=9, groups_per_forward=2), prompts[1]
    named = f"{longest.record['path']} and 1 more: a prompt of {len(longest.ids)} tokens, {said}"
    with pytest.raises(SystemExit, match=named):
        dipr1.grpo_step(policy, None, dipr1.make_optimizer(policy), encoder, prompts[:2], cfg, 0, 1e-2)


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    Image.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert dipr1.open_image(tmp_path / "turned.jpg").size == data_prep.image_size(tmp_path / "turned.jpg") == (20, 40)


# ------------------------------------------------------------------------------------------------------------
# Training steps


def step_config(**options):
    small = dict(prompts_per_step=4, group_size=3, max_new_tokens=12, groups_per_forward=1)
    return Config(**{**small, "lr": 1e-4, "warmup_steps": 0, **options})


def rewards_by_index(zero_odd):
    """Rewards without a judge: random ones, a function of the prompt; all equal for odd prompts if so asked."""
    def rewards(group, recall_weight):
        G = len(group.completions)
        drawn = torch.from_numpy(np.random.default_rng(group.prompt.index).random((G, 3)))
        return torch.full((G, 3), 0.5).double() if zero_odd and group.prompt.index % 2 else drawn
    return rewards


SCENARIOS = [
    dict(), dict(zero_odd=True, beta=0.0), dict(freeze_vision=True), dict(num_iterations=2, groups_per_forward=2)
]


def three_steps(tiny, rank, world, zero_odd=False, **options):
    """Weights after three GRPO steps on four prompts, of which this rank takes every world-th. A rank whose prompts
    are the odd ones has zero advantage throughout where `zero_odd`."""
    cfg = step_config(**options)
    policy, encoder, prompts = load(tiny, freeze_vision=cfg.freeze_vision)
    reference = copy.deepcopy(policy).eval() if cfg.beta else None
    parallel = dipr1.parallel(policy)
    optimizer = dipr1.make_optimizer(parallel)
    original, dipr1.group_rewards = dipr1.group_rewards, rewards_by_index(zero_odd)
    for step in range(3):
        dipr1.grpo_step(parallel, reference, optimizer, encoder, prompts[:4][rank::world], cfg, step, cfg.lr)
    dipr1.group_rewards = original
    return {name: p.detach().clone() for name, p in policy.named_parameters()}


def poisoned_step(tiny, rank):
    """A step in which one rank's loss is infinite, but not its gradients; then one in which they are NaN."""
    policy, _, prompts = load(tiny)
    before = copy.deepcopy(policy.state_dict())
    policy = dipr1.parallel(policy)
    optimizer, chunks = dipr1.make_optimizer(policy), [[random_group(prompts[0])]]
    metrics = [dipr1.update(policy, optimizer, chunks, lambda chunk: policy(chunk).mean() * factor + term, 1e-3, 1.0)
               for factor, term in ((1.0, float("inf") if rank else 0.0), (float("nan") if rank else 1.0, 0.0))]
    same = all(torch.equal(value, before[name]) for name, value in policy.module.state_dict().items())
    return [m["skipped"] for m in metrics], same


def worker(rank, tiny, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    assert poisoned_step(tiny, rank) == ([1, 1], True), "not finite on one rank: both leave the weights alone"
    results = [three_steps(tiny, rank, 2, **scenario) for scenario in SCENARIOS]
    torch.save(results, f"{folder}/rank-{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_end_with_the_weights_of_one(tiny, tmp_path):
    """Also where one rank's groups all have zero advantage, with a frozen tower, with two updates a rollout. And a loss
    that is not finite on one of them is skipped by both."""
    torch.multiprocessing.spawn(worker, (tiny, tmp_path), nprocs=2)
    two = [torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1)]
    start = {name: p.detach() for name, p in load(tiny)[0].named_parameters()}
    for number, scenario in enumerate(SCENARIOS):
        one = three_steps(tiny, 0, 1, **scenario)
        moved = max((one[name] - start[name]).abs().max().item() for name in one)
        assert moved > 2e-4, "three steps at 1e-4 should have moved something"
        for name in one:
            assert torch.equal(two[0][number][name], two[1][number][name]), (scenario, name)
            assert torch.allclose(one[name], two[0][number][name], atol=1e-5, rtol=0), (scenario, name)
        frozen = all(torch.equal(one[name], start[name]) for name in one if ".visual." in name)
        assert frozen == bool(scenario.get("freeze_vision"))


def test_a_step_repeats_exactly_and_a_higher_reward_becomes_likelier(tiny):
    runs = []
    for _ in range(2):
        policy, encoder, prompts = load(tiny)
        optimizer, cfg = dipr1.make_optimizer(policy), step_config(beta=0.0, lr=1e-3)
        original, dipr1.group_rewards = dipr1.group_rewards, rewards_by_index(False)
        _, groups = dipr1.grpo_step(policy, None, optimizer, encoder, prompts[:2], cfg, 0, cfg.lr)
        rewards = torch.stack([dipr1.group_rewards(group, 0.75) for group in groups])
        dipr1.group_rewards = original
        with torch.no_grad():
            after = policy(groups)
        runs.append(after)
        before = torch.cat([group.rollout_logp for group in groups])
        advantages = torch.cat(dipr1.token_advantages(encoder, groups, rewards, cfg))
        assert ((after - before) * advantages).sum() > 0
    assert torch.equal(*runs)


def test_frozen_features_are_computed_once_a_step(tiny):
    seen = []  # images in each pass of the vision tower, of the policy or the reference
    apart = [2, 1, 1, 1, 1]  # the rollout, then reference and policy for each group
    for freeze, passes in ((True, [2]), (False, apart)):
        policy, encoder, prompts = load(tiny, freeze_vision=freeze)
        cfg, optimizer = step_config(freeze_vision=freeze), dipr1.make_optimizer(policy)
        reference = copy.deepcopy(policy).eval()
        for model in (policy, reference):
            model.model.model.visual.register_forward_pre_hook(
                lambda _, args, kwargs: seen.append(len(kwargs.get("grid_thw", args[-1]))), with_kwargs=True)
        dipr1.grpo_step(policy, reference, optimizer, encoder, prompts[:2], cfg, 0, 1e-4)
        assert seen == passes
        seen.clear()


def test_a_completion_of_placeholders_trains(tiny):
    policy, _, prompts = load(tiny)
    optimizer = dipr1.make_optimizer(policy)
    config = policy.model.config
    group = Group(prompts[1], [torch.full((6,), config.image_token_id), torch.full((3,), config.video_token_id)])

    def loss_of(chunk):
        logp = policy(chunk)
        advantages = torch.tensor([1.0] * 6 + [-1.0] * 3)
        return dipr1.grpo_loss(logp, logp.detach(), logp.detach() - 0.1, advantages, 0.2, 0.04)[0]

    metrics = dipr1.update(policy, optimizer, [[group]], loss_of, 1e-4, 1.0)
    assert math.isfinite(metrics["loss"]) and not metrics["skipped"]


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_leaves_the_weights_alone(tiny, poison):
    policy, _, prompts = load(tiny)
    optimizer, before = dipr1.make_optimizer(policy), copy.deepcopy(policy.state_dict())
    chunks = [[random_group(prompts[0])]]
    metrics = dipr1.update(policy, optimizer, chunks, lambda chunk: policy(chunk).sum() * poison, 1e-3, 1.0)
    assert metrics["skipped"] == 1
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())
    metrics = dipr1.update(policy, optimizer, chunks, lambda chunk: policy(chunk).mean(), 1e-3, 1.0)
    assert metrics["skipped"] == 0 and not torch.equal(policy.model.lm_head.weight, before["model.lm_head.weight"])


def test_ten_skipped_updates_in_a_row_stop_the_run(tmp_path):
    log, bar = dipr1.Log(tmp_path), tqdm(disable=True)
    metrics = {"loss": float("nan"), "grad_norm": float("inf"), "skipped": 1.0}
    for step in range(9):
        log.write("grpo", step, metrics, bar)
    log.write("grpo", 9, metrics | {"skipped": 0.0}, bar)
    for step in range(10, 19):
        log.write("grpo", step, metrics, bar)
    with pytest.raises(SystemExit, match="grpo step 19: ten updates in a row not finite .loss nan, gradient norm inf"):
        log.write("grpo", 19, metrics, bar)
    written = [json.loads(line, parse_constant=pytest.fail) for line in open(tmp_path / "metrics.jsonl")]
    assert len(written) == 20 and written[0]["loss"] is None, "NaN is not JSON"


def test_bf16_weights_move_at_a_learning_rate_that_bf16_cannot_see():
    """1,000 steps of 1e-5 add up to 1e-2 in the fp32 masters; bf16 weights around 1, left alone, never move."""
    weight, plain = (torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16)) for _ in range(2))
    ours = dipr1.MasterAdamW([weight], lr=1e-5, weight_decay=0.0)
    naive = torch.optim.AdamW([plain], lr=1e-5, weight_decay=0.0)
    for _ in range(1000):
        weight.grad, plain.grad = torch.ones_like(weight), torch.ones_like(plain)
        ours.step()
        naive.step()
    assert (plain == 1).all()
    assert torch.allclose(weight.float(), torch.tensor(0.99), atol=4e-3)
    assert torch.allclose(ours.masters[0], torch.tensor(0.99), atol=1e-4)


def test_the_bytes_a_parameter_are_those_of_the_readme(monkeypatch):
    """At rest a bf16 weight and 12 bytes for the optimizer; while it steps a gradient of 4 in place of one of 2."""
    weight = torch.nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
    optimizer = dipr1.MasterAdamW([weight], lr=1e-5)
    weight.grad = torch.ones_like(weight)
    size = lambda tensors: sum(t.element_size() * t.numel() for t in tensors if t is not None)
    step, seen = torch.optim.AdamW.step, []

    def watched(self):
        seen.append(size([weight.grad, optimizer.masters[0].grad]))
        return step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    assert size([weight.grad]) == 2 * 1000
    optimizer.step()
    moments = [t for state in optimizer.state.values() for t in state.values() if t.numel() > 1]
    assert size([weight]) == 2 * 1000 and size([*optimizer.masters, *moments]) == 12 * 1000 and seen == [4 * 1000]


def test_on_fp32_weights_the_optimizer_is_torchs_adamw():
    a, b = (torch.nn.Parameter(torch.linspace(-1, 1, 6)) for _ in range(2))
    options = dict(lr=1e-2, weight_decay=0.1)
    ours, theirs = dipr1.MasterAdamW([a], **options), torch.optim.AdamW([b], **options)
    for step in range(5):
        a.grad = torch.sin(torch.arange(6.0) + step)
        b.grad = a.grad.clone()
        ours.step()
        theirs.step()
    assert torch.allclose(a, b)


def test_learning_rate_warms_up_and_decays_to_zero():
    rates = [dipr1.learning_rate(step, 10, 2.0, 4) for step in range(11)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0] and rates[10] == 0 and rates[4:] == sorted(rates[4:], reverse=True)


def test_sft_learns_a_scene_by_heart_and_the_evaluation_sees_it(tiny, tmp_path):
    policy, encoder, prompts = load(tiny)
    optimizer = dipr1.make_optimizer(policy)
    cfg = Config(groups_per_forward=1, group_size=4, max_new_tokens=80, batch_size=2)
    records = [p.record for p in prompts[:4]]
    assert dipr1.evaluate(policy, encoder, records, cfg, tmp_path)["f1"] == 0
    for _ in range(80):
        metrics = dipr1.sft_step(policy, optimizer, encoder, prompts[:4], cfg, 3e-3)
    assert metrics["loss"] < 0.1
    figures = dipr1.evaluate(policy, encoder, records, cfg, tmp_path)
    assert figures["f1"] == figures["jaccard"] == figures["format_rate"] == 1
    people = np.mean([len(p.truth) for p in prompts[:4]])
    assert figures["boxes_per_image"] == figures["truth_boxes_per_image"] == people


# ------------------------------------------------------------------------------------------------------------
# Evaluation: every figure against a slow, independent way of computing it


def random_detections(rng, n=200):
    """(pred, truth, ignore) of n images: some empty, some crowded, answers jittered, doubled, invented."""
    def some(k, size=100):
        corner = rng.uniform(0, 80, (k, 2))
        return np.hstack([corner, corner + rng.uniform(5, size - 60, (k, 2))])

    images = []
    for _ in range(n):
        truth, ignore = some(rng.integers(0, 7)), some(rng.integers(0, 3), 110)
        copies = truth[rng.integers(0, len(truth), rng.integers(0, 9))] if len(truth) else truth
        pred = np.vstack([copies + rng.normal(0, rng.choice([0.3, 3]), copies.shape), some(rng.integers(0, 3))])
        inside = ignore[:1] + rng.normal(0, 1, ignore[:1].shape)
        images.append((rng.permutation(np.vstack([pred, inside]))[:8], truth, ignore))
    return images


def slow_iou(a, b, of_first=False):
    """Of two boxes, in plain numbers; intersection over the first's area if asked."""
    inner = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    area_a, area_b = max(0, a[2] - a[0]) * max(0, a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1])
    whole = area_a if of_first else area_a + area_b - inner
    return inner / whole if whole > 0 else 0.0


def slow_matching(pred, truth, threshold):
    """The pairs of largest total IoU by trying every assignment, one truth after the other."""
    ious = [[slow_iou(p, t) for t in truth] for p in pred]

    @functools.cache
    def best(t, used):
        if t == len(truth):
            return 0.0, ()
        options = [best(t + 1, used)]
        for p in range(len(pred)):
            if not used >> p & 1 and ious[p][t] >= threshold:
                total, pairs = best(t + 1, used | 1 << p)
                options.append((total + ious[p][t], ((p, t), *pairs)))
        return max(options)

    return best(0, 0)[1], ious


def slow_figures(images):
    """The definitions of the README, box by box."""
    figures, by_threshold, jaccard, errors, all_ious, hidden_found = {}, [], [], [], [], []
    for threshold in [0.5 + 0.05 * k for k in range(10)]:
        tp = n_pred = n_truth = 0
        for pred, truth, ignore in images:
            pairs, ious = slow_matching(pred, truth, threshold)
            taken = {p for p, _ in pairs}
            excused = lambda box: any(slow_iou(box, region, of_first=True) > 0.5 for region in ignore)
            counted = sum(p in taken or not excused(box) for p, box in enumerate(pred))
            tp, n_pred, n_truth = tp + len(pairs), n_pred + counted, n_truth + len(truth)
            if threshold == 0.5:
                errors.append(abs(counted - len(truth)))
                all_ious += [ious[p][t] for p, t in pairs]
                found = {t for _, t in pairs}
                n = sum(t in found or not excused(box) for t, box in enumerate(truth))
                jaccard.append(len(pairs) / (counted + n - len(pairs)) if counted + n else 1.0)
                for t, box in enumerate(truth):
                    if any(slow_iou(box, other) > 0.2 for k, other in enumerate(truth) if k != t):
                        hidden_found.append(t in found)
        p, r = tp / n_pred, tp / n_truth
        by_threshold.append((p, r, 2 * p * r / (p + r)))
    for k, name in enumerate(("precision", "recall", "f1")):
        figures[name] = by_threshold[0][k]
        figures[f"{name}_50_95"] = sum(row[k] for row in by_threshold) / 10
    mean = lambda values: sum(values) / len(values)
    return figures | {"jaccard": mean(jaccard), "count_mae": mean(errors), "mean_iou": mean(all_ious),
                      "crowded_recall": mean(hidden_found),
                      "boxes_per_image": mean([len(p) for p, _, _ in images]),
                      "truth_boxes_per_image": mean([len(t) for _, t, _ in images])}


def slow_average_precision(images, threshold):
    """COCO's rule, detection by detection, and the interpolated precision by looking at every point."""
    hits, n_truth = [], sum(len(truth) for _, truth, _ in images)
    for pred, truth, ignore in images:
        taken = set()
        for box in pred:
            overlaps = [(slow_iou(box, t), k) for k, t in enumerate(truth) if k not in taken]
            iou, k = max(overlaps, default=(0, None))
            if iou >= threshold:
                taken.add(k)
                hits.append(True)
            elif not any(slow_iou(box, region, of_first=True) >= threshold for region in ignore):
                hits.append(False)
    points = [(sum(hits[:k]) / n_truth, sum(hits[:k]) / k) for k in range(1, len(hits) + 1)]
    return sum(max((p for r, p in points if r >= level), default=0) for level in np.linspace(0, 1, 101)) / 101


def test_every_figure_equals_its_definition_on_200_images():
    images = random_detections(np.random.default_rng(0))
    figures, slow = dipr1.detection_figures(images), slow_figures(images)
    slow |= {"ap50": slow_average_precision(images, 0.5),
             "ap": np.mean([slow_average_precision(images, t) for t in np.linspace(0.5, 0.95, 10)])}
    assert set(figures) == set(slow)
    for name, value in slow.items():
        assert figures[name] == pytest.approx(value, abs=1e-9), name
        assert value > 0.1, f"{name} tests nothing if it is near zero"


def test_average_precision_equals_pycocotools():
    """The same detections with equal scores; our ignore regions are its `iscrowd`."""
    pytest.importorskip("pycocotools")
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    images = random_detections(np.random.default_rng(1))
    images = [(p[(p[:, 2:] > p[:, :2]).all(axis=1)], t, i) for p, t, i in images]  # it knows no inverted boxes
    images[0] = (np.vstack([images[0][0]] * 30), *images[0][1:])  # more than the 100 that COCO looks at
    xywh = lambda box: [box[0], box[1], box[2] - box[0], box[3] - box[1]]
    truth = [{"image_id": k, "category_id": 1, "bbox": xywh(box), "area": 1.0, "iscrowd": crowd}
             for k, (_, *both) in enumerate(images) for crowd, boxes in enumerate(both) for box in boxes]
    found = [{"image_id": k, "category_id": 1, "bbox": xywh(box), "score": 1.0}
             for k, (pred, _, _) in enumerate(images) for box in pred]
    coco = COCO()
    coco.dataset = {"images": [{"id": k} for k in range(len(images))], "categories": [{"id": 1}],
                    "annotations": [entry | {"id": k} for k, entry in enumerate(truth, 1)]}
    coco.createIndex()
    evaluation = COCOeval(coco, coco.loadRes(found), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    figures = dipr1.detection_figures(images)
    assert figures["ap"] == pytest.approx(evaluation.stats[0], abs=1e-9)
    assert figures["ap50"] == pytest.approx(evaluation.stats[1], abs=1e-9)


def test_ap_depends_on_the_order_of_the_answer_and_nothing_else_does():
    truth, none = boxes([0, 0, 10, 10], [20, 0, 30, 10]), boxes()
    right_first, wrong_first = ([(boxes(*rows), truth, none)] for rows in (
        [[0, 0, 10, 10], [50, 50, 60, 60]], [[50, 50, 60, 60], [0, 0, 10, 10]]))
    # One of two found: recalls 0 to .5 are 51 of the 101 points, at precision 1 or 1/2.
    assert dipr1.average_precision(right_first, 0.5) == pytest.approx(51 / 101)
    assert dipr1.average_precision(wrong_first, 0.5) == pytest.approx(51 / 101 / 2)
    a, b = dipr1.detection_figures(right_first), dipr1.detection_figures(wrong_first)
    assert {name for name in a if a[name] != b[name]} == {"ap", "ap50"}


def test_jaccard_leftovers_in_ignore_regions_leave_both_counts():
    pred, truth = boxes([0, 0, 10, 10], [50, 50, 60, 60], [80, 0, 90, 10]), boxes([0, 0, 10, 10], [55, 50, 60, 60])
    assert dipr1.jaccard_index(pred, truth, boxes()) == pytest.approx(2 / 3)  # IoU .5 counts as a pair
    truth = boxes([0, 0, 10, 10], [57, 50, 60, 60])
    assert dipr1.jaccard_index(pred, truth, boxes()) == 1 / 4
    assert dipr1.jaccard_index(pred, truth, boxes([40, 40, 70, 70])) == 1 / 2  # one pair, one prediction outside
    assert dipr1.jaccard_index(boxes(), boxes(), boxes()) == 1 and dipr1.jaccard_index(boxes(), truth, boxes()) == 0


def test_figures_of_nothing_are_zero_and_finite():
    nothing = dipr1.detection_figures([(boxes(), boxes(), boxes())])
    assert nothing.pop("jaccard") == 1 and all(value == 0 for value in nothing.values())


def test_no_edge_moves_by_more_than_a_pixel_on_the_way_out_and_back(tiny):
    """Truth -> model space -> text -> parsed -> original pixels, for a thousand sizes."""
    processor, rng = load(tiny)[1].image_processor, np.random.default_rng(0)
    for _ in range(1000):
        size = width, height = [int(n) for n in np.exp(rng.uniform(np.log(30), np.log(4000), 2))]
        if max(size) / min(size) > 100:
            continue
        rows, columns = (n // 14 for n in smart_resize(height, width, 28, processor.size["shortest_edge"], 10**6))
        grid = torch.tensor([[1, rows, columns]])
        corner = rng.uniform(0, 0.9, (5, 2)) * size
        truth = np.hstack([corner, corner + rng.uniform(0.01, 1, (5, 2)) * (np.array(size) - corner)])
        text = str(dipr1.to_model_space(truth, size, grid).round().astype(int).tolist())
        back = dipr1.to_image_space(dipr1.parse_boxes(text), size, grid)
        pixel = dipr1.to_image_space(np.ones((1, 4)), size, grid)  # of model space, in original ones
        assert (np.abs(back - truth) <= pixel).all()


@pytest.mark.parametrize("layouts", ["small_layouts", "real_layouts"])
def test_an_oracle_scores_one_on_every_source(tiny, tmp_path, layouts):
    """Who answers with the truth, in whole pixels of the model's space, has to be right in the original's."""
    if layouts == "real_layouts" and not REAL.exists():
        pytest.skip("needs the real annotation files")
    encoder, seen = load(tiny)[1], {}
    encoder.image_processor.size["longest_edge"] = Config.max_pixels
    for source, (split, options) in globals()[layouts](tmp_path).items():
        predictions, records = [], convert(source, tmp_path / source, split, max_boxes=1000, no_verify=True, **options)
        for record in records[::10]:
            size = record["width"], record["height"]
            if size not in seen:  # the pictures are blank: one of a size is enough to encode
                seen[size] = encoder.prompt(0, record)
            truth = dipr1.to_model_space(record["boxes"], size, seen[size].grid)
            prompt = dataclasses.replace(seen[size], record=record, truth=truth)
            text = encoder.tokenizer.decode(encoder.target(prompt)[:-1])
            predictions += dipr1.answers(prompt, [text], [[dipr1.format_reward(text), 0, 0]])
        figures = dipr1.score(records[::10], predictions)
        assert figures["f1"] == figures["jaccard"] == figures["format_rate"] == 1, (source, figures)


def test_a_predictions_file_scores_as_the_model_that_wrote_it(tiny, tmp_path, capsys):
    policy, encoder, prompts = load(tiny)
    records, cfg = dipr1.load_records(tiny[1]), Config(max_new_tokens=80, samples=3, groups_per_forward=1, pictures=2)
    optimizer = dipr1.make_optimizer(policy)
    for _ in range(60):
        dipr1.sft_step(policy, optimizer, encoder, prompts, cfg, 3e-3)
    figures = dipr1.evaluate(policy, encoder, records, cfg, tmp_path)
    drawn = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert 0 < figures["f1"] and drawn == {"000000.png", "000001.png"}
    path = tmp_path / "predictions.jsonl"

    def scored(*more):
        dipr1.main(["--predictions", str(path), "--data", str(tiny[1]), "--output_dir", str(tmp_path), *more])
        return json.loads((tmp_path / "eval.json").read_text())

    without = dipr1.evaluate(policy, encoder, records, dataclasses.replace(cfg, samples=0), tmp_path / "greedy")
    assert without["f1"] == figures["f1"] and not {"look_reward", "sampled_f1"} & set(without)
    again = scored()
    assert again["images"] == len(records) and {name: again[name] for name in figures} == figures
    # Another tool's file, in another order and without one image: that one counts as answered by nothing.
    lines = [{"image": r["image"], "boxes": r["boxes"].tolist()} for r in records]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines[:0:-1]))
    other = scored()
    assert "no prediction for 1 of 6 images" in capsys.readouterr().out
    assert other["precision"] == 1 and "format_rate" not in other and "sampled_f1" not in other
    people = [len(r["boxes"]) for r in records]
    assert other["recall"] == sum(people[1:]) / sum(people) and scored("--limit", "1")["images"] == 1
    for line, said in ((lines[1], "line 6: .*comes too often"),
                       ({"image": "x.png", "boxes": []}, "line 6.*not in the data"),
                       ({"image": lines[0]["image"], "boxes": [[1, 2]]}, "line 6"), ({"image": 1}, "line 6")):
        path.write_text("".join(json.dumps(entry) + "\n" for entry in [*lines[1:], line]))
        with pytest.raises(SystemExit, match=said):
            scored()


def test_mixed_targets_empty_and_turned_images_train_together(tiny, tmp_path):
    """People and vehicles in one file, an image without any, one that lies on its side, ignore regions, all sizes."""
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.new("RGB", (120, 60), (200, 80, 30)).save(tmp_path / "turned.jpg", exif=exif)
    Image.new("RGB", (90, 300), (20, 80, 30)).save(tmp_path / "long.png")
    data_prep.write_jsonl(tmp_path / "mixed.jsonl", [
        {"image": "turned.jpg", "width": 60, "height": 120, "target": "vehicle", "boxes": [[0, 60, 60, 120]]},
        {"image": "long.png", "width": 90, "height": 300, "target": "person", "boxes": [], "ignore": [[0, 0, 90, 90]]},
        {"image": "long.png", "width": 90, "height": 300, "boxes": [[10, 20, 50, 90], [30, 20, 70, 90]]},
    ])
    dipr1.main(["--model", str(tiny[0]), "--data", str(tmp_path / "mixed.jsonl"), "--output_dir", str(tmp_path / "run"),
                "--sft_steps", "2", "--sft_batch", "3", "--steps", "2", "--prompts_per_step", "3", "--group_size", "3",
                "--max_new_tokens", "8", "--groups_per_forward", "3"])
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 4 and not any(line["skipped"] for line in lines)
    encoder, records = load(tiny)[1], dipr1.load_records(tmp_path / "mixed.jsonl")
    prompts = [encoder.prompt(index, record) for index, record in enumerate(records)]
    assert ["every vehicle" in encoder.tokenizer.decode(p.ids) for p in prompts] == [True, False, False]
    assert [encoder.tokenizer.decode(encoder.target(p)).split(",")[0] for p in prompts] == [
        "<think>1 vehicles", "<think>0 people", "<think>2 people"]


# ------------------------------------------------------------------------------------------------------------
# Perception-R1 through the same loop


@pytest.fixture(scope="session")
def four_tasks(tmp_path_factory):
    """A tiny checkpoint, and one file with a few drawn scenes of each task."""
    folder, records = tmp_path_factory.mktemp("tasks"), []
    data_prep.tiny(folder / "model", questions=list(dipr1.PERCEPTION_QUESTIONS.values()))
    for task in dipr1.TRUTH:
        data_prep.synthetic(folder / task, 5, seed=0, task=task)
        for record in map(json.loads, open(folder / task / "train.jsonl")):
            records.append(record | {"image": f"{task}/{record['image']}"})
    records[0]["labels"] = ["person"] * len(records[0]["boxes"])
    data_prep.write_jsonl(folder / "all.jsonl", records)
    return folder


def test_an_oracle_earns_everything_in_every_task(four_tasks):
    """The supervised target, written and read back, is right to a rounding, and so are its figures."""
    cfg = Config(model=str(four_tasks / "model"))
    encoder = dipr1.Encoder(*dipr1.load_model(cfg, torch.device("cpu")))
    records = dipr1.load_records(four_tasks / "all.jsonl", "perception-r1")
    assert len(records) == 16 and len({record["task"] for record in records}) == 4
    predictions = []
    for index, record in enumerate(records):
        prompt = encoder.prompt(index, record)
        text = encoder.decode(encoder.target(prompt))
        form, answer = dipr1.perception_rewards(text, prompt)
        assert form == 1 and answer > 0.98, text
        predictions += dipr1.answers(prompt, [text], [[form, 0, answer]])
    figures = dipr1.score(records, json.loads(json.dumps(predictions)))
    for name in ("detection f1", "grounding acc_0.95", "counting exact_count", "ocr word_f1", "format_rate"):
        assert figures[name] == 1, name
    assert figures["counting count_mae"] == figures["ocr edit_distance"] == 0 and figures["accuracy_reward"] > 0.98


def test_mixed_tasks_train_and_are_evaluated_together(four_tasks, tmp_path):
    flags = ["--method", "perception-r1", "--model", four_tasks / "model", "--data", four_tasks / "all.jsonl",
             "--max_new_tokens", "16", "--group_size", "3"]
    flags = [str(flag) for flag in flags]
    dipr1.main([*flags, "--output_dir", str(tmp_path), "--sft_steps", "2", "--sft_batch", "4", "--steps", "2",
                "--prompts_per_step", "4", "--picture_every", "1"])
    lines = lines_of(tmp_path)
    assert [line["phase"] for line in lines] == ["sft"] * 2 + ["grpo"] * 2
    assert all(not line["skipped"] for line in lines)
    assert -1 <= lines[-1]["reward_format"] <= 1 and lines[-1]["reward_look"] == 0
    dipr1.main([*flags[:2], "--eval", "--model", str(tmp_path / "checkpoint-000004"), *flags[4:], "--samples", "2",
                "--output_dir", str(tmp_path / "eval")])
    figures = json.loads((tmp_path / "eval/eval.json").read_text())
    assert {"detection f1", "grounding acc_0.5", "counting count_mae", "ocr word_f1",
            "sampled_accuracy_reward"} <= set(figures)
    assert len(list((tmp_path / "eval/pictures").iterdir())) == 8
    dipr1.main([*flags[:2], "--predictions", str(tmp_path / "eval/predictions.jsonl"), *flags[4:6],
                "--output_dir", str(tmp_path / "again")])
    again = json.loads((tmp_path / "again/eval.json").read_text())
    assert {name: again[name] for name in again if name != "source"} == {
        name: figures[name] for name in figures if name != "source"}
    with pytest.raises(SystemExit, match="line 5: .*grounding needs --method perception-r1"):
        dipr1.load_records(four_tasks / "all.jsonl")


def test_figures_of_the_other_tasks_by_hand():
    box = boxes([0, 0, 10, 10])
    images = [(pred, box, None) for pred in (box, boxes([0, 0, 10, 6]), boxes(), boxes([0, 0, 10, 8]))]
    assert dipr1.grounding_figures(images) == {
        "acc_0.5": 0.75, "acc_0.75": 0.5, "acc_0.95": 0.25, "mean_iou": pytest.approx(0.6)}
    points = [(np.zeros((n, 2)), np.zeros((m, 2)), None) for n, m in ((3, 3), (0, 2), (5, 4), (0, 0))]
    assert dipr1.counting_figures(points) == {"exact_count": 0.5, "count_mae": 0.75}
    texts = [("the cat sat", "the cat sat", None), ("the the", "the dog", None), ("", "x", None)]
    figures = dipr1.ocr_figures(texts)
    assert figures["word_f1"] == pytest.approx(2 * 4 / (6 + 2 + 2 + 0 + 1))
    assert figures["edit_distance"] == pytest.approx((0 + 3 / 7 + 1) / 3)


def test_the_comparison_starts_all_from_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(dipr1, "DEMO_SCENES", 12)
    monkeypatch.setattr(dipr1, "DEMO_HELD_OUT", 4)
    monkeypatch.setattr(dipr1.os, "cpu_count", lambda: 1)
    starts, plain = [], dipr1.train_grpo

    def watched(policy, encoder, records, cfg, log):
        starts.append({name: value.clone() for name, value in policy.state_dict().items()})
        assert {record["method"] for record in records} == {cfg.method}
        return plain(policy, encoder, records, cfg, log)

    monkeypatch.setattr(dipr1, "train_grpo", watched)
    dipr1.main(["--demo", "--compare", "2", "--output_dir", str(tmp_path), "--sft_steps", "2", "--sft_batch", "4",
                "--steps", "1", "--prompts_per_step", "2", "--lr", "1e-2", "--max_new_tokens", "20", "--samples", "2"])
    runs = json.loads((tmp_path / "compare.json").read_text())
    ways = ["SFT", "SFT, answer alone", "Perception-R1", "DIP-R1 without look", "DIP-R1"]
    assert len(runs) == 2 and list(runs[0]) == ways
    assert all(torch.equal(starts[0][name], start[name]) for start in starts[:3] for name in starts[0])
    assert not torch.equal(starts[0]["model.lm_head.weight"], starts[3]["model.lm_head.weight"])  # another seed


# ------------------------------------------------------------------------------------------------------------
# The command line, as a user types it


def run(*command, expect=0):
    command = [sys.executable, *map(str, command)]
    result = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=240)
    assert result.returncode == expect, result.stderr[-3000:]
    return result.stdout + result.stderr


def test_training_under_torchrun_writes_metrics_pictures_and_a_checkpoint_to_evaluate(tiny, tmp_path):
    small = ["--group_size", 3, "--max_new_tokens", 12, "--prompts_per_step", 2]
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", 29513]
    run(*torchrun, "dipr1.py", "--model", tiny[0], "--data", tiny[1], "--output_dir", tmp_path,
        "--sft_steps", 1, "--sft_batch", 2, "--steps", 2, "--picture_every", 1, *small)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["phase"], line["step"]) for line in lines] == [("sft", 0), ("grpo", 0), ("grpo", 1)]
    assert all(math.isfinite(value) for line in lines for name, value in line.items() if name != "phase")
    readme = (HERE / "README.md").read_text()
    assert all(f"`{name}`" in readme for line in lines for name in line), "a metric that the README does not define"
    for step in (1, 2):
        assert Image.open(tmp_path / "pictures" / f"step-{step:06d}.png").size[0] > 400

    checkpoint = tmp_path / "checkpoint-000003"
    names = {path.name for path in checkpoint.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json", "dipr1.json",
            "optimizer-0.pt", "optimizer-1.pt"} <= names
    assert not list(tmp_path.glob("*.tmp"))
    Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint)
    assert "tree" not in (checkpoint / "config.json").read_text(), "others know no tree attention"
    for rank in (0, 1):
        assert torch.load(checkpoint / f"optimizer-{rank}.pt", weights_only=True)["masters"]

    shown = run("dipr1.py", "--eval", "--model", checkpoint, "--data", tiny[1],
                "--output_dir", tmp_path / "eval", *small[:4])
    figures = json.loads((tmp_path / "eval" / "eval.json").read_text())
    run(*torchrun, "dipr1.py", "--eval", "--model", checkpoint, "--data", tiny[1], "--limit", 5,
        "--output_dir", tmp_path / "two", *small[:4])
    texts = [[(p["image"], p["text"]) for p in map(json.loads, open(tmp_path / folder / "predictions.jsonl"))]
             for folder in ("eval", "two")]
    assert texts[0][:5] == texts[1] and len(texts[0]) == 6  # shared out over ranks, and in order again
    assert {"precision", "recall", "f1", "jaccard", "format_rate", "look_reward", "boxes_per_image",
            "truth_boxes_per_image"} <= set(figures) and "jaccard" in shown
    with pytest.raises(SystemExit, match="holds a run already"):
        dipr1.main(["--model", str(tiny[0]), "--data", str(tiny[1]), "--output_dir", str(tmp_path)])


def test_the_demo_end_to_end_in_small(tmp_path):
    """It starts itself again in two processes; the trap: both draw the scenes, and one replaces the file that the
    other reads."""
    (tmp_path / "small.py").write_text(f"""if __name__ == "__main__":
    import os, sys
    sys.path.insert(0, {str(HERE)!r})
    import data_prep, dipr1
    dipr1.DEMO_SCENES, dipr1.DEMO_HELD_OUT, synthetic = 12, 4, data_prep.synthetic
    data_prep.synthetic = lambda *args, **more: (print("scenes are drawn"), synthetic(*args, **more))
    print("one of two processes" if os.environ.get("WORLD_SIZE") == "2" else "on its own")
    dipr1.main()
""")
    shown = run(tmp_path / "small.py", "--demo", "--output_dir", tmp_path, "--seed", 3, "--sft_steps", 2, "--steps", 1,
                "--prompts_per_step", 2, "--group_size", 2, "--picture_every", 1, "--max_new_tokens", 16)
    assert shown.count("scenes are drawn") == 1 and shown.count("held-out images") == 1 and "Warning" not in shown
    assert shown.count("one of two processes") == (2 if os.cpu_count() > 1 else 0)
    summary = json.loads((tmp_path / "summary.json").read_text())
    names = {"precision", "recall", "f1", "jaccard", "format_rate", "look_reward", "boxes_per_image",
             "truth_boxes_per_image", "sampled_f1", "sampled_look_reward"}
    assert summary["seed"] == 3 and summary["seconds"] > 0 and names <= set(summary["sft"]) == set(summary["dip-r1"])
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3 and list((tmp_path / "pictures").iterdir())


def test_what_is_missing_is_said_in_a_line_with_the_remedy(tiny, tmp_path):
    message = run("dipr1.py", "--data", tmp_path / "no.jsonl", "--output_dir", tmp_path / "o", expect=1)
    assert "data_prep.py crowdhuman" in message and "--demo" in message and "Traceback" not in message
    (tmp_path / "model").mkdir()
    with pytest.raises(SystemExit, match="cannot load --model"):
        dipr1.main(["--model", str(tmp_path / "model"), "--data", str(tiny[1]), "--output_dir", str(tmp_path / "o")])


def test_a_checkpoint_cut_short_is_an_error_in_a_line(tiny, tmp_path):
    for path in tiny[0].iterdir():
        content = path.read_bytes()
        (tmp_path / path.name).write_bytes(content[: len(content) // 2] if path.suffix == ".safetensors" else content)
    with pytest.raises(SystemExit, match="cannot load --model"):
        dipr1.load_model(Config(model=str(tmp_path)), torch.device("cpu"))


# ------------------------------------------------------------------------------------------------------------
# Kill it, and go on


def training(tiny, folder, *more):
    """The flags of a small run: two supervised steps, four of GRPO, a checkpoint after each."""
    return [str(flag) for flag in (
        "--model", tiny[0], "--data", tiny[1], "--output_dir", folder, "--sft_steps", 2, "--sft_batch", 4,
        "--sft_lr", 1e-3, "--steps", 4, "--prompts_per_step", 4, "--group_size", 3, "--max_new_tokens", 10,
        "--lr", 1e-3, "--save_every", 1, "--keep", 0, "--picture_every", 0, *more)]


def weights(checkpoint):
    return load_file(checkpoint / "model.safetensors")


def lines_of(folder):
    """metrics.jsonl without what a clock says."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if "second" not in name} for line in lines]


@pytest.fixture(scope="session")
def finished(tiny, tmp_path_factory):
    """A run that nobody interrupted."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    dipr1.main(training(tiny, folder))
    return folder


def assert_same_run(folder, finished):
    a, b = weights(folder / "checkpoint-000006"), weights(finished / "checkpoint-000006")
    assert all(torch.equal(a[name], b[name]) for name in b) and set(a) == set(b)
    assert lines_of(folder) == lines_of(finished) and len(lines_of(folder)) == 6


@pytest.mark.parametrize("done", [1, 2, 4])  # in the warm-up, at its end, in GRPO
def test_a_resumed_run_ends_bit_for_bit_as_one_that_was_not_interrupted(tiny, finished, tmp_path, done):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    for step in range(done + 1, 7):
        shutil.rmtree(folder / f"checkpoint-{step:06d}")
    dipr1.main(training(tiny, folder, "--resume"))
    assert_same_run(folder, finished)


def test_a_checkpoint_cut_anywhere_is_recognised_and_the_one_before_it_used(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    last, rng = tmp_path / "run/checkpoint-000006", np.random.default_rng(0)
    assert dipr1.complete(last)["step"] == 6
    paths = sorted(last.iterdir())
    for path in rng.choice(paths, 20):
        whole = path.read_bytes()
        path.write_bytes(whole[: rng.integers(0, len(whole))])
        assert dipr1.complete(last) is None, path
        path.write_bytes(whole)
    (last / "model.safetensors").unlink()
    cfg = Config(**json.loads((finished / "checkpoint-000006/dipr1.json").read_text())["config"])
    cfg = dataclasses.replace(cfg, resume="newest", output_dir=str(tmp_path / "run"))
    assert dipr1.find_checkpoint(cfg) == (tmp_path / "run/checkpoint-000005", 5)
    assert "checkpoint-000006 is not complete" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="not complete"):
        dipr1.find_checkpoint(dataclasses.replace(cfg, resume=str(last)))


def test_resuming_another_run_is_refused_with_the_reason(tiny, finished, tmp_path):
    with pytest.raises(SystemExit, match="holds a run already: --resume it"):
        dipr1.main(training(tiny, finished))
    for flags, said in ((["--lr", "1e-4"], "its lr was 0.001 and is 0.0001"), (["--seed", "1"], "its seed")):
        with pytest.raises(SystemExit, match=said):
            dipr1.main(training(tiny, finished, "--resume", *flags))
    other = tmp_path / "train.jsonl"
    other.write_text(tiny[1].read_text().replace("person", "people"))
    config = json.loads((finished / "checkpoint-000006/dipr1.json").read_text())["config"]
    with pytest.raises(SystemExit, match="its data was"):
        dipr1.find_checkpoint(Config(**config | {"resume": "newest", "data": str(other)}))
    shutil.copytree(finished, tmp_path / "run")
    state = json.loads((tmp_path / "run/checkpoint-000006/dipr1.json").read_text())
    for name, value, said in (("world_size", 2, "its processes was 2 and is 1"),
                              ("data_sha256", "0", "its data's content")):
        (tmp_path / "run/checkpoint-000006/dipr1.json").write_text(json.dumps(state | {name: value}))
        with pytest.raises(SystemExit, match=said):
            dipr1.find_checkpoint(Config(**config | {"resume": "newest", "output_dir": str(tmp_path / "run")}))


def test_old_checkpoints_go(tiny, tmp_path):
    dipr1.main(training(tiny, tmp_path / "run", "--keep", "2", "--resume"))  # nothing there to resume: it begins
    assert [path.name for path in sorted((tmp_path / "run").glob("checkpoint*"))] == [
        "checkpoint-000005", "checkpoint-000006"]


def test_an_image_that_is_lost_while_training_weighs_nothing_and_many_stop_the_run(tiny, tmp_path, capsys):
    records = [json.loads(line) for _ in range(40) for line in tiny[1].read_text().splitlines()]
    for record in records:
        record["image"] = str(tiny[1].parent / record["image"])
    records[1]["image"] = "gone.png"
    data_prep.write_jsonl(tmp_path / "train.jsonl", records)
    _, encoder, _ = load(tiny)
    records = dipr1.load_records(tmp_path / "train.jsonl")
    prompts = [prompt for _, step in dipr1.batches(encoder, records, 24, seed=0, steps=10) for prompt in step]
    assert [p.index for p in prompts if p.weight == 0] == [1]
    assert "gone.png: no longer readable" in capsys.readouterr().err

    policy, _, _ = load(tiny)
    (lost,) = [prompt for prompt in prompts if prompt.weight == 0]
    reference, optimizer = copy.deepcopy(policy).eval(), dipr1.make_optimizer(policy)
    before = {name: p.clone() for name, p in policy.named_parameters()}
    metrics, _ = dipr1.grpo_step(policy, reference, optimizer, encoder, [lost],
                                 Config(group_size=3, max_new_tokens=9), 0, 1e-2)
    assert metrics["lost_images"] == 1 and metrics["loss"] == 0
    assert all(torch.equal(p, before[name]) for name, p in policy.named_parameters())
    for record in records[:3]:
        record["path"] = "gone.png"
    with pytest.raises(SystemExit, match="more than 1% of the images"):
        list(dipr1.batches(encoder, records, 24, seed=0, steps=10))


def start(*flags, processes=1, torchrun_flags=(), before=()):
    """A real training process (or torchrun with several), in a session of its own so that all of it can be killed."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), *torchrun_flags]
    command = [*before, sys.executable, *(torchrun if processes > 1 else []), "dipr1.py", *flags]
    return subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())})


def test_sigterm_finishes_the_step_writes_a_checkpoint_and_leaves(tiny, finished, tmp_path):
    process = start(*training(tiny, tmp_path / "run", "--save_every", "100"))
    metrics = tmp_path / "run/metrics.jsonl"
    while not (metrics.exists() and metrics.read_text()):
        time.sleep(0.05)
    process.terminate()
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 128 + signal.SIGTERM and "stopped by SIGTERM" in said, said
    (folder,) = (tmp_path / "run").glob("checkpoint*")
    assert dipr1.complete(folder)["step"] == len(metrics.read_text().splitlines()) < 6
    dipr1.main(training(tiny, tmp_path / "run", "--save_every", "100", "--resume"))
    assert_same_run(tmp_path / "run", finished)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_killed_again_and_again_ends_as_one_that_was_not(tiny, tmp_path, processes):
    """SIGKILL at ten random moments, by preference while a checkpoint is being written (one, with two processes)."""
    whole, killed, rng = tmp_path / "whole", tmp_path / "killed", np.random.default_rng(processes)
    assert start(*training(tiny, whole), processes=processes).wait(timeout=300) == 0
    for number in range(10 if processes == 1 else 1):
        process = start(*training(tiny, killed, "--resume"), processes=processes)
        while process.poll() is None and not list(killed.glob("*.tmp" if number % 2 else "metrics.jsonl")):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02 if number % 2 else 1.0))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    last = start(*training(tiny, killed, "--resume"), processes=processes)
    assert last.wait(timeout=300) == 0
    a, b = weights(killed / "checkpoint-000006"), weights(whole / "checkpoint-000006")
    assert all(torch.equal(a[name], b[name]) for name in b)
    assert lines_of(killed) == lines_of(whole) and len(lines_of(whole)) == 6


def test_ranks_started_again_find_each_other_and_not_the_dead(tmp_path):
    """torchrun keeps its store when it starts all ranks again. Rank 1, which comes first, would read the address of
    the dead rank 0 there, and the run would hang."""
    (tmp_path / "ranks.py").write_text(f"""
import os, signal, sys, time
sys.path.insert(0, {str(HERE)!r})
import dipr1
again, rank = os.environ["TORCHELASTIC_RESTART_COUNT"] == "1", os.environ["RANK"]
if again and rank == "0":
    time.sleep(2)
dipr1.join_processes()
dipr1.barrier()
if not again and rank == "1":
    os.kill(os.getpid(), signal.SIGKILL)
dipr1.barrier()
print("met again")
""")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shown = run("-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", port, "--max_restarts", 1,
                tmp_path / "ranks.py")
    assert shown.count("met again") == 2


@pytest.mark.slow
def test_torchrun_brings_a_run_back_that_lost_a_rank(tiny, tmp_path):
    """SIGKILL to one of two ranks, in the middle of GRPO: torchrun starts both again, from the last checkpoint."""
    whole, hurt = tmp_path / "whole", tmp_path / "hurt"
    assert start(*training(tiny, whole), processes=2).wait(timeout=300) == 0
    process = start(*training(tiny, hurt), processes=2, torchrun_flags=["--max_restarts", "1"])
    while not (hurt / "checkpoint-000003").exists():
        assert process.poll() is None
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said[-3000:]
    a, b = weights(hurt / "checkpoint-000006"), weights(whole / "checkpoint-000006")
    assert all(torch.equal(a[name], b[name]) for name in b)
    assert lines_of(hurt) == lines_of(whole) and len(lines_of(whole)) == 6


def room_left(kind, folder, kilobytes):
    """-> the words that run a command where only so much can be written to the folder, or to any one file."""
    if kind == "a quota on files":
        return ["sh", "-c", f'ulimit -f {2 * kilobytes}; exec "$@"', "sh"]
    disk, used = folder.parent / "disk", sum(path.stat().st_size for path in folder.rglob("*")) // 1024
    disk.mkdir()
    script = (f'mount -t tmpfs -o size={used + kilobytes}k none {disk} && cp -r {folder}/. {disk} && rm -r {folder} '
              f'&& "$@"; code=$?; cp -r {disk} {folder}; exit $code')
    return ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh"]


@pytest.mark.parametrize("kind", ["a full disk", "a quota on files"])
def test_a_full_disk_leaves_the_last_checkpoint_usable_and_is_said(tiny, finished, tmp_path, kind, monkeypatch, capsys):
    """The run wants to write checkpoints 4 to 6, and there is room for half of one. Then room is made."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    for step in (4, 5, 6):
        shutil.rmtree(folder / f"checkpoint-{step:06d}")
    disk = kind == "a full disk"
    if disk and subprocess.run(["unshare", "--user", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "none",
                                tmp_path], capture_output=True).returncode:
        pytest.skip("no small disk can be mounted here")
    words = room_left(kind, folder, 3000)
    process = start(*training(tiny, tmp_path / "disk" if disk else folder, "--resume"), before=words)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 1 and "Traceback" not in said, said[-3000:]
    for step in (4, 5, 6):
        assert f"checkpoint-{step:06d} could not be written" in said
    assert "the last checkpoint could not be written: make room, and --resume" in said
    assert ("No space left" in said) == disk
    assert [path.name for path in sorted(folder.glob("checkpoint*"))] == [f"checkpoint-{n:06d}" for n in (1, 2, 3)]
    assert len(lines_of(folder)) == 6

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dipr1, "draw_picture", full)  # pictures first, this time
    dipr1.main(training(tiny, folder, "--resume", "--picture_every", "1"))
    assert "step-000002.png could not be written" in capsys.readouterr().err
    assert_same_run(folder, finished)


def test_metrics_that_cannot_be_written_stop_the_run_in_a_line(tmp_path):
    log = dipr1.Log(tmp_path)
    log.file = open("/dev/full", "a")
    with pytest.raises(SystemExit, match="/dev/full: .* No space left on device; make room"):
        log.write("sft", 0, {"loss": 1.0, "skipped": 0.0}, tqdm(disable=True))
    with pytest.raises(OSError):
        log.file.close()  # it tries once more


# ------------------------------------------------------------------------------------------------------------
# data_prep.py


def test_scenes_repeat_from_their_seed_and_their_boxes_fit(tmp_path):
    for name in ("a", "b"):
        data_prep.synthetic(tmp_path / name, 30, seed=4)
    records = dipr1.load_records(tmp_path / "a" / "train.jsonl") + dipr1.load_records(tmp_path / "a" / "val.jsonl")
    assert len(records) == 30
    assert (tmp_path / "a" / "train.jsonl").read_text() == (tmp_path / "b" / "train.jsonl").read_text()
    assert (tmp_path / "a/images/000007.png").read_bytes() == (tmp_path / "b/images/000007.png").read_bytes()
    for record in records:
        b = record["boxes"]
        assert (b[:, :2] >= 0).all() and (b[:, 2:] <= 112).all() and (b[:, 2:] > b[:, :2]).all()
    overlaps = sum((dipr1.box_iou(r["boxes"], r["boxes"]) - np.eye(len(r["boxes"])) > 0.05).any() for r in records)
    assert overlaps > 10, "a crowd in which nobody hides anybody teaches nothing"


def test_a_persons_box_is_tight():
    """Drawn alone on black, the figure touches all four sides of its box."""
    figure = data_prep.draw_person(np.random.default_rng(0), 60)
    solid = np.array(figure.getchannel("A")) > 127
    assert solid[0].any() and solid[-1].any() and solid[:, 0].any() and solid[:, -1].any()


# ------------------------------------------------------------------------------------------------------------
# data_prep.py, real annotations: each data set laid out as it ships, with pictures that we make


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def make_pictures(paths, size=(100, 80)):
    """Pictures of this size at all paths, hard links to the first: hundreds cost no more than one."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path == paths[0]:
            Image.new("RGB", size, (90, 120, 150)).save(path)
        else:
            path.hardlink_to(paths[0])


def crowdhuman_layout(root, lines, size=(100, 80)):
    make_pictures([root / "Images" / f"{json.loads(line)['ID']}.jpg" for line in lines], size)
    write(root / "annotation_train.odgt", "\n".join(lines) + "\n")


def citypersons_mat_layout(root, images, size=(2048, 1024)):
    """`images`: {(city, name): rows}. Cells nest as in the real file: 1 x 1 structs in a 1 x N cell array."""
    kind = [("cityname", object), ("im_name", object), ("bbs", object)]
    cells = np.empty((1, len(images)), object)
    for k, ((city, name), rows) in enumerate(images.items()):
        cells[0, k] = np.array([[(np.array([city]), np.array([name]), rows)]], dtype=kind)
    (root / "annotations").mkdir(parents=True)
    savemat(root / "annotations/anno_val.mat", {"anno_val_aligned": cells})
    make_pictures([root / "leftImg8bit/val" / city / name for city, name in images], size)


def convert(source, root, split="val", **options):
    """Run the real command line -> the records that it wrote."""
    out = root.parent / f"{source}.jsonl"
    flags = [text for name, value in options.items() for text in (f"--{name}", *([str(value)] * (value is not True)))]
    data_prep.main([source, str(root), "--split", split, "--out", str(out), *flags])
    return dipr1.load_records(out)


def person(fbox, tag="person", **extra):
    return {"tag": tag, "fbox": fbox, "extra": extra, "head_attr": {"ignore": 1}}


def test_crowdhuman_converts(tmp_path, capsys):
    people = [person([10, 10, 20, 30]), person([90, 70, 40, 40]), person([5, 5, -3, 9]),
              person([0, 0, 9, 9], ignore=1), person([50, 0, 9, 9], tag="mask"),
              {"tag": "person", "fbox": [1, 2, 3, 4]}]
    crowds = {"1,a": people, "2,b": [person([0, 0, 5, 5])] * 61, "3,c": []}
    crowdhuman_layout(tmp_path / "ch", [json.dumps({"ID": i, "gtboxes": b}) for i, b in crowds.items()])
    first, empty = convert("crowdhuman", tmp_path / "ch", "train", draw=1)
    # The second is clipped, the one of negative width dropped; a person without the optional keys counts.
    assert first["boxes"].tolist() == [[10, 10, 30, 40], [90, 70, 100, 80], [1, 2, 4, 6]]
    assert first["ignore"].tolist() == [[0, 0, 9, 9], [50, 0, 59, 9]]
    assert dipr1.open_image(first["path"]).size == (first["width"], first["height"]) == (100, 80)
    assert len(empty["boxes"]) == 0 and (tmp_path / "crowdhuman-0.png").exists()
    said = capsys.readouterr().out
    for line in ("2  images", "3  boxes", "2  ignore regions", "1  images left out: more than 60 boxes",
                 "1  boxes left out: no area", "median 1.5, max 3", "0        1  #", "2-4        1  #"):
        assert line in said, line


def test_small_boxes_become_ignore_regions_and_limit_draws_at_random(tmp_path):
    lines = [json.dumps({"ID": f"{k}", "gtboxes": [person([10, 10, 4, k])]}) for k in range(5, 65)]
    crowdhuman_layout(tmp_path / "ch", lines)
    records = convert("crowdhuman", tmp_path / "ch", "train", min_size=30)
    for record in records:
        (box,) = [*record["boxes"], *record["ignore"]]
        assert len(record["boxes"]) == (box[3] - box[1] >= 30)
    drawn = [[r["image"] for r in convert("crowdhuman", tmp_path / "ch", "train", limit=9, seed=s)] for s in (0, 0, 1)]
    everything = [r["image"] for r in records]
    assert drawn[0] == drawn[1] != drawn[2] and len(drawn[0]) == 9
    assert drawn[0] == sorted(drawn[0], key=everything.index) and drawn[0] != everything[:9]


def test_what_cannot_be_read_is_named_counted_and_left_out(tmp_path, capsys):
    crowdhuman_layout(tmp_path / "ch", [json.dumps({"ID": name, "gtboxes": []}) for name in "abcd"])
    whole = (tmp_path / "ch/Images/a.jpg").read_bytes()
    for name, content in (("b", whole[:-20]), ("d", b"\x89PNG\r\n\x1a\n" + bytes(40))):
        (tmp_path / f"ch/Images/{name}.jpg").unlink()
        (tmp_path / f"ch/Images/{name}.jpg").write_bytes(content)
    (tmp_path / "ch/Images/c.jpg").unlink()
    assert [r["image"] for r in convert("crowdhuman", tmp_path / "ch", "train")] == ["ch/Images/a.jpg"]
    said = capsys.readouterr()
    assert all(f"{name}.jpg" in said.err for name in "bcd") and "3  images left out: missing or unreadable" in said.out
    # Whoever is in a hurry reads headers only, and so does not see the cut.
    assert len(convert("crowdhuman", tmp_path / "ch", "train", no_verify=True)) == 2


def test_sizes_are_of_the_upright_image(tmp_path):
    crowdhuman_layout(tmp_path / "ch", [json.dumps({"ID": "a", "gtboxes": [person([0, 0, 80, 100])]})])
    exif = Image.Exif()
    exif[0x0112] = 6  # on its side
    Image.new("RGB", (100, 80)).save(tmp_path / "ch/Images/a.jpg", exif=exif)
    for options in ({}, {"no_verify": True}):
        (record,) = convert("crowdhuman", tmp_path / "ch", "train", **options)
        assert (record["width"], record["height"]) == (80, 100) == dipr1.open_image(record["path"]).size
        assert record["boxes"].tolist() == [[0, 0, 80, 100]]


@pytest.mark.parametrize("source, file, text, said", [
    ("crowdhuman", "annotation_val.odgt", '{"ID": "1", "gtboxes": []}\n{"ID": "2"}\n', "annotation_val.odgt, line 2"),
    ("crowdhuman", "annotation_val.odgt", "{\n", "annotation_val.odgt, line 1"),
    ("widerpedestrian", "val_annotations.txt", "img00001.jpg 1 2 3 4 5\nimg00002.jpg 1 2 3 4\n", "line 2.*4 numbers"),
    ("widerpedestrian", "val_annotations.txt", "img00001.jpg 7 2 3 4 5\n", "line 1.*class"),
    ("widerpedestrian", "val_annotations.txt", "img00001.jpg 1 2 3 4 x\n", "line 1.*could not convert"),
    ("widerpedestrian", "Annotations/val_bbox.txt", "sur00001.jpg 1 2 3 4 5\n", "line 1.*5 numbers"),
    ("widerpedestrian", "Annotations/val_bbox.txt", "cat.jpg 1 2 3 4\n", "line 1.*cat.jpg"),
    ("coco", "annotations/instances_val2017.json", '{"images": []}', "instances_val2017.json: KeyError"),
    ("coco", "annotations/instances_val2017.json", json.dumps({
        "images": [{"id": 1, "file_name": "a.jpg"}], "categories": [{"id": 7, "name": "person"}],
        "annotations": [{"image_id": 1, "category_id": 7, "bbox": [1, 2, 3]}]}), "annotation 1"),
    ("coco", "annotations/instances_val2017.json", '{"images": [], "annotations": [], "categories": [{"id": 1, '
     '"name": "dog"}]}', "no category 'person', but 'dog'"),
    ("citypersons", "gtBboxCityPersons/val/a/b_gtBboxCityPersons.json", '{"objects": [{"label": "rider"}]}',
     "b_gtBbox"),
    ("citypersons", "annotations/anno_val.mat", "no matlab file at all", "anno_val.mat: "),
    ("crowdhuman", "annotation_val.odgt", '{"ID": "gone", "gtboxes": []}\n',
     "nothing converted.*1 images left out: missing"),
    ("crowdhuman", "annotation_val.odgt", "\n", "nothing converted"),
    ("crowdhuman", "elsewhere", "", "looked there for annotation_val.odgt"),
    ("citypersons", "elsewhere", "", "anno_val.mat, or gtBboxCityPersons/val"),
    ("widerpedestrian", "elsewhere", "", "val_annotations.txt, or Annotations/val_bbox.txt"),
    ("coco", "elsewhere", "", "instances_val2017.json"),
])
def test_what_is_malformed_is_said_with_its_place_and_no_file_is_left(tmp_path, source, file, text, said):
    write(tmp_path / "root" / file, text)
    (tmp_path / "root/Images").mkdir()
    (tmp_path / "root/leftImg8bit/val").mkdir(parents=True)
    with pytest.raises(SystemExit, match=said):
        convert(source, tmp_path / "root")
    assert [path.name for path in tmp_path.iterdir()] == ["root"]


def test_citypersons_numbers_do_not_wrap_around(tmp_path):
    """The trap: the file keeps an image's rows in uint8 where all numbers fit, and 200 + 100 is then 44."""
    rows = np.array([[1, 200, 100, 100, 250, 7, 0, 0, 0, 0], [2, 1, 2, 3, 4, 8, 0, 0, 0, 0]])
    images = {("aachen", "a_leftImg8bit.png"): rows.astype(np.uint8),
              ("ulm", "b_leftImg8bit.png"): -rows.astype(np.int16),
              ("ulm", "c_leftImg8bit.png"): np.zeros((0, 10), np.uint8)}
    assert (images["aachen", "a_leftImg8bit.png"][0, [1, 3]].sum(dtype=np.uint8)) == 44
    citypersons_mat_layout(tmp_path / "cp", images)
    first, beyond, empty = convert("citypersons", tmp_path / "cp")
    assert first["boxes"].tolist() == [[200, 100, 300, 350]] and first["ignore"].tolist() == [[1, 2, 4, 6]]
    assert first["target"] == "pedestrian" and len(beyond["boxes"]) == len(empty["boxes"]) == 0


def test_both_forms_of_citypersons_say_the_same(tmp_path):
    names = ["ignore", "pedestrian", "rider", "sitting person", "person (other)", "person group"]
    rows = np.array([[k, 10 * k, 20, 30, 40, 0, 10 * k, 20, 30, 40] for k in [*range(6), 1]], np.uint16)
    citypersons_mat_layout(tmp_path / "mat", {("bonn", "x_leftImg8bit.png"): rows})
    objects = [{"label": names[row[0]], "bbox": row[1:5], "bboxVis": row[6:]} for row in rows.tolist()]
    write(tmp_path / "json/gtBboxCityPersons/val/bonn/x_gtBboxCityPersons.json", json.dumps({"objects": objects}))
    make_pictures([tmp_path / "json/leftImg8bit/val/bonn/x_leftImg8bit.png"], (2048, 1024))
    (a,), (b,) = (convert("citypersons", tmp_path / form) for form in ("mat", "json"))
    assert a["boxes"].tolist() == b["boxes"].tolist() == [[10, 20, 40, 60]] * 2
    assert a["ignore"].tolist() == b["ignore"].tolist() and len(a["ignore"]) == 5


def test_the_two_wider_forms_are_told_apart(tmp_path):
    """Twenty numbers are four boxes of 2018 and five of 2019; read in the wrong form they are nonsense."""
    numbers = [1, 10, 20, 5, 6] * 4
    text = " ".join(map(str, numbers))
    write(tmp_path / "w18/val_annotations.txt", f"img00001.jpg {text}\nimg00002.jpg\nimg00003.jpg 2 1 2 3 4\n")
    write(tmp_path / "w18/ignore_part_val.txt", "img00001.jpg 0 0 9 9\n")
    make_pictures([tmp_path / f"w18/{split}/img0000{k}.jpg" for k in (1, 2, 3) for split in ("val", "train")])
    first, bare, cyclist = convert("widerpedestrian", tmp_path / "w18")
    assert first["boxes"].tolist() == [[10, 20, 15, 26]] * 4 and first["ignore"].tolist() == [[0, 0, 9, 9]]
    assert len(bare["boxes"]) == 0 and cyclist["boxes"].tolist() == [[1, 2, 4, 6]]
    assert first["image"] == "w18/val/img00001.jpg"  # and not the other split's, of the same name

    write(tmp_path / "w19/Annotations/train_bbox.txt", f"ad00001.jpg {text}\nsur00002.jpg\n")
    write(tmp_path / "w19/Annotations/train_ignore.txt", "sur00002.jpg 1 1 7 7 2 2 9 9\n")
    make_pictures([tmp_path / "w19/ad_train/ad_03/ad00001.jpg", tmp_path / "w19/sur_train/sur00002.jpg"])
    first, bare = convert("widerpedestrian", tmp_path / "w19", "train")
    assert len(first["boxes"]) == 5 and first["boxes"][0].tolist() == [1, 10, 21, 15]
    assert len(bare["ignore"]) == 2 and first["image"] == "w19/ad_train/ad_03/ad00001.jpg"


def uavdt_layout(root, rows, frames, sequence="M0101"):
    write(root / f"GT/{sequence}_gt_whole.txt", "\n".join(rows) + "\n")
    make_pictures([root / f"UAV-benchmark-M/{sequence}/img{frame:06d}.jpg" for frame in frames])


def test_uavdt_rows_are_sorted_by_target_and_not_by_frame(tmp_path):
    rows = [f"{frame},{target},{10 * target},5,8,9,1,1,{target}" for target in (1, 2, 3) for frame in (3, 1)]
    uavdt_layout(tmp_path / "u", rows, (1, 2, 3, 4))
    uavdt_layout(tmp_path / "u", ["1,1,0,0,9,9,1,1,1"], (1,), sequence="M0203")  # a sequence of the test split
    write(tmp_path / "u/GT/M0101_gt_ignore.txt", "1,9,60,8,5,4,1,-1,-1\n")
    records = convert("uavdt", tmp_path / "u", "train")
    assert [len(r["boxes"]) for r in records] == [3, 0, 3, 0]  # frames without a box are images too
    assert records[2]["boxes"][:, 0].tolist() == [10, 20, 30] and records[0]["ignore"].tolist() == [[60, 8, 65, 12]]
    assert {r["target"] for r in records} == {"vehicle"}
    assert [r["image"][-7:] for r in convert("uavdt", tmp_path / "u", "train", stride=2)] == ["001.jpg", "003.jpg"]
    assert len(convert("uavdt", tmp_path / "u", "test")) == 1


def test_uavdts_file_without_classes_is_refused(tmp_path):
    uavdt_layout(tmp_path / "u", ["1,1,0,0,9,9,1,1,-1"], (1,))  # gt.txt under the name of gt_whole.txt
    with pytest.raises(SystemExit, match="M0101_gt_whole.txt, line 1.*gt_whole.txt"):
        convert("uavdt", tmp_path / "u", "train")
    (tmp_path / "u/GT/M0101_gt_whole.txt").rename(tmp_path / "u/GT/M0101_gt.txt")
    with pytest.raises(SystemExit, match="lacks M0101_gt_whole.txt"):
        convert("uavdt", tmp_path / "u", "train")


def coco_layout(root, annotations, images=("a.jpg", "b.jpg"), name="instances_val2017.json"):
    write(root / "annotations" / name, json.dumps({
        "images": [{"id": k, "file_name": image} for k, image in enumerate(images)],
        "categories": [{"id": 1, "name": "person"}, {"id": 90, "name": "toothbrush"}],
        "annotations": [{"image_id": i, "category_id": c, "bbox": b, "iscrowd": crowd}
                        for i, c, b, crowd in annotations],
    }))
    make_pictures([root / "val2017" / image for image in images])


def test_coco_takes_one_category_and_crowds_are_ignore_regions(tmp_path):
    coco_layout(tmp_path / "co", [(0, 1, [1.5, 2, 3, 4], 0), (0, 1, [0, 0, 50, 60], 1), (0, 90, [9, 9, 9, 9], 0)])
    person, empty = convert("coco", tmp_path / "co")
    assert person["boxes"].tolist() == [[1.5, 2, 4.5, 6]] and person["ignore"].tolist() == [[0, 0, 50, 60]]
    assert len(empty["boxes"]) == 0 and person["image"] == "co/val2017/a.jpg" and person["target"] == "person"
    brush, _ = convert("coco", tmp_path / "co", category="toothbrush")
    assert brush["boxes"].tolist() == [[9, 9, 18, 18]] and brush["target"] == "toothbrush"
    make_pictures([tmp_path / "co/more/a.jpg"])
    with pytest.raises(SystemExit, match="a.jpg could be"):
        convert("coco", tmp_path / "co")


def asked(source, root, out, *flags):
    """What data_prep.py makes of one of Perception-R1's sources, as dipr1.py reads it."""
    data_prep.main([source, str(root), "--out", str(out), *flags])
    return dipr1.load_records(out, "perception-r1")


def refcoco_layout(root, refs, name="refs(unc).p"):
    make_pictures([root / "train2014/COCO_train2014_000000000007.jpg"])
    write(root / "instances.json", json.dumps({
        "images": [{"id": 7, "file_name": "COCO_train2014_000000000007.jpg"}],
        "annotations": [{"id": 1, "bbox": [10, 20, 30, 40]}, {"id": 2, "bbox": [200, 0, 9, 9]}]}))
    (root / name).write_bytes(pickle.dumps(refs, protocol=2))


def reference(ann, split, *phrases):
    return {"ann_id": ann, "image_id": 7, "split": split, "sentences": [{"sent": phrase} for phrase in phrases]}


def test_refcoco_gives_a_line_for_each_phrase(tmp_path, capsys):
    refcoco_layout(tmp_path, [reference(1, "train", "the left one", "red shirt"), reference(1, "testA", "other"),
                              reference(2, "train", "beyond the image")])
    a, b = asked("refcoco", tmp_path, tmp_path / "out.jsonl", "--split", "train", "--draw", "1")
    assert [a["target"], b["target"]] == ["the left one", "red shirt"] and a["task"] == "grounding"
    assert a["boxes"].tolist() == [[10, 20, 40, 60]] and (a["width"], a["height"]) == (100, 80)
    assert "1  questions left out: the truth is outside the image" in capsys.readouterr().out
    (tmp_path / "refs(google).p").write_bytes(b"")
    with pytest.raises(SystemExit, match="found refs.google..p, refs.unc..p; --refs names it"):
        asked("refcoco", tmp_path, tmp_path / "out.jsonl", "--split", "train")
    assert len(asked("refcoco", tmp_path, tmp_path / "out.jsonl", "--split", "testA", "--refs", "refs(unc).p")) == 1


class Rude:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_a_pickle_that_names_a_class_is_refused_and_nothing_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for rude in (Rude(), [Path("x")], np.zeros(2)):
        refcoco_layout(tmp_path, rude)
        with pytest.raises(SystemExit, match=r"refs.unc..p: UnpicklingError: it names"):
            asked("refcoco", tmp_path, tmp_path / "out.jsonl", "--split", "train")
    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps([reference(1, "train", "x")])[:-9])
    with pytest.raises(SystemExit, match=r"refs.unc..p: "):
        asked("refcoco", tmp_path, tmp_path / "out.jsonl", "--split", "train")
    assert not (tmp_path / "pwned").exists() and not (tmp_path / "out.jsonl").exists()


def test_pixmo_count_and_ocr_convert(tmp_path, capsys):
    make_pictures([tmp_path / "a.jpg"])
    points = [{"x": 10, "y": 20.5}, {"x": 99, "y": 79}]
    lines = [{"image": "a.jpg", "points": points, "count": 2, "label": "bird"},
             {"image": "a.jpg", "points": [], "count": 0, "label": "cat"},
             {"image": "a.jpg", "points": [{"x": 200, "y": 1}], "count": 1, "label": "dog"},
             {"image": "gone.jpg", "points": [], "count": 0, "label": "cat"}]
    write(tmp_path / "count.jsonl", "\n".join(map(json.dumps, lines)))
    birds, cats = asked("pixmo_count", tmp_path / "count.jsonl", tmp_path / "c.jsonl", "--draw", "2")
    assert birds["points"].tolist() == [[10, 20.5], [99, 79]] and birds["target"] == "bird" and len(cats["points"]) == 0
    said = capsys.readouterr().out
    assert "1  questions left out: the truth" in said and "1  images left out: missing" in said
    write(tmp_path / "count.jsonl", json.dumps(lines[0] | {"count": 3}))
    with pytest.raises(SystemExit, match="count.jsonl, line 1: ValueError: count is 3, but there are 2 points"):
        asked("pixmo_count", tmp_path / "count.jsonl", tmp_path / "c.jsonl")

    turns = [{"from": "human", "value": "<image> Read."}, {"from": "gpt", "value": "Two\nlines"}]
    write(tmp_path / "pages.json", json.dumps([{"image": "a.jpg", "conversations": turns}]))
    (page,) = asked("ocr", tmp_path / "pages.json", tmp_path / "o.jsonl")
    assert page["transcript"] == "Two\nlines" and page["task"] == "ocr"
    write(tmp_path / "pages.json", json.dumps([{"image": "a.jpg", "conversations": turns[:1]}]))
    with pytest.raises(SystemExit, match="pages.json, entry 1: ValueError"):
        asked("ocr", tmp_path / "pages.json", tmp_path / "o.jsonl")


def test_converting_takes_the_same_memory_however_long_the_file(tmp_path):
    crowd = {"gtboxes": [person([k, 2, 30, 60], box_id=k, occ=0) for k in range(23)]}
    peaks = []
    for n in (200, 2000):
        crowdhuman_layout(tmp_path / f"{n}", [json.dumps({"ID": f"{k}", **crowd}) for k in range(n)])
        tracemalloc.start()
        annotations = data_prep.crowdhuman(tmp_path / f"{n}", "train")
        data_prep.convert(annotations, tmp_path / "o.jsonl", "person", verify=False)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert sum(1 for _ in open(tmp_path / "o.jsonl")) == n
    assert peaks[1] - peaks[0] < 300_000, peaks  # the 1,800 lines more are 5 MB of text, and several times that parsed


def small_layouts(root):
    """A few images of every data set as it ships, by hand -> {source: (split, options)}."""
    lines = [json.dumps({"ID": "1,a", "gtboxes": [person([10, 10, 20, 30]), person([90, 70, 40, 40])]})]
    crowdhuman_layout(root / "crowdhuman", lines)
    rows = np.array([[1, 200, 100, 100, 250, 7, 0, 0, 0, 0], [2, 1, 2, 30, 40, 8, 0, 0, 0, 0]], np.uint8)
    citypersons_mat_layout(root / "citypersons", {("ulm", "a_leftImg8bit.png"): rows})
    write(root / "widerpedestrian/train_annotations.txt", "img00001.jpg 1 10 20 15 26 2 40 20 15 26\nimg00002.jpg\n")
    make_pictures([root / f"widerpedestrian/train/img0000{k}.jpg" for k in (1, 2)])
    uavdt_layout(root / "uavdt", ["2,1,5,5,18,9,1,1,1", "1,1,7,5,18,9,1,1,1"], (1, 2))
    coco_layout(root / "coco", [(0, 1, [1.5, 2, 13, 14], 0), (0, 1, [0, 0, 50, 60], 1)])
    return {"crowdhuman": ("train", {}), "citypersons": ("val", {}), "widerpedestrian": ("train", {}),
            "uavdt": ("train", {}), "coco": ("val", {})}


def real_layouts(root):
    """The real annotation files laid out as the data sets ship -> {source: (split, options)}."""
    lines = (REAL / "crowdhuman_train.odgt").read_text().splitlines()
    crowdhuman_layout(root / "crowdhuman", lines, (2048, 1356))
    cells = loadmat(REAL / "citypersons_anno_val.mat")["anno_val_aligned"][0]
    names = [(str(c["cityname"][0, 0][0]), str(c["im_name"][0, 0][0])) for c in cells]
    make_pictures([root / "citypersons/leftImg8bit/val" / city / name for city, name in names], (2048, 1024))
    (root / "citypersons/annotations").mkdir()
    shutil.copy(REAL / "citypersons_anno_val.mat", root / "citypersons/annotations/anno_val.mat")
    text = (REAL / "wider2018_annotations.txt").read_text()
    write(root / "widerpedestrian/train_annotations.txt", text)
    make_pictures([root / "widerpedestrian/train" / line.split()[0] for line in text.splitlines()], (1700, 1100))
    shutil.copytree(REAL, root / "uavdt/GT", ignore=lambda _, files: [f for f in files if "uavdt" not in f])
    for path in (root / "uavdt/GT").iterdir():
        path.rename(path.with_name(path.name.removeprefix("uavdt_")))
    frames = {int(row.split(",")[0]) for row in (root / "uavdt/GT/M0101_gt_whole.txt").read_text().split()}
    make_pictures([root / f"uavdt/UAV-benchmark-M/M0101/img{frame:06d}.jpg" for frame in sorted(frames)], (1024, 540))
    for image in json.loads((REAL / "wider2019_val_first200_coco.json").read_text())["images"]:
        make_pictures([root / "coco/val_data" / image["file_name"]], (image["width"], image["height"]))
    return {
        "crowdhuman": ("train", {}), "citypersons": ("val", {}), "widerpedestrian": ("train", {}),
        "uavdt": ("train", {}),
        "coco": ("val", {"category": "pedestrain", "annotations": REAL / "wider2019_val_first200_coco.json"}),
    }


@pytest.mark.skipif(not REAL.exists(), reason="needs the real annotation files")
def test_the_real_files_convert_to_the_counts_that_they_should(tmp_path):
    found = {}
    for source, (split, options) in real_layouts(tmp_path).items():
        records = convert(source, tmp_path / source, split, max_boxes=1000, **options)
        found[source] = (len(records), sum(len(r["boxes"]) for r in records), sum(len(r["ignore"]) for r in records))
        for record in records:
            for b in (record["boxes"], record["ignore"]):
                assert (b >= 0).all() and (b <= [record["width"], record["height"]] * 2).all()
    assert found["crowdhuman"] == (1, 6, 1)
    assert found["citypersons"] == (500, 3157, 5795 - 3157)
    assert found["coco"] == (200, 781, 0)
    rows = {name: len((REAL / f"uavdt_M0101_{name}.txt").read_text().split()) for name in ("gt_whole", "gt_ignore")}
    assert found["uavdt"][1:] == (rows["gt_whole"], rows["gt_ignore"])
    numbers = [len(line.split()) - 1 for line in (REAL / "wider2018_annotations.txt").read_text().splitlines()]
    assert found["widerpedestrian"] == (len(numbers), sum(numbers) / 5, 0)


@pytest.mark.skipif(not REAL.exists(), reason="needs the real annotation files")
def test_the_real_crowdhuman_line_trains(tiny, tmp_path):
    """The road from real annotations to two training steps, with a picture of the right size in the image's place."""
    crowdhuman_layout(tmp_path / "ch", (REAL / "crowdhuman_train.odgt").read_text().splitlines(), (2048, 1356))
    (record,) = convert("crowdhuman", tmp_path / "ch", "train")
    assert len(record["boxes"]) == 6 and len(record["ignore"]) == 1
    assert record["boxes"][:, 3].max() == 1356  # annotated down to 2041
    dipr1.main(["--model", str(tiny[0]), "--data", str(tmp_path / "crowdhuman.jsonl"),
                "--output_dir", str(tmp_path / "run"), "--steps", "2", "--prompts_per_step", "1",
                "--group_size", "2", "--max_new_tokens", "8", "--max_pixels", "100000"])
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


# ------------------------------------------------------------------------------------------------------------
# python test_dipr1.py: the naive way of the tests and ours, timed side by side

SHAPES = {  # of the model (vision, text), the image's patches a side, and the prompt's tokens beside the image
    "small": dict(
        vision=dict(depth=6, hidden_size=256, intermediate_size=512, num_heads=4, out_hidden_size=512),
        text=dict(vocab_size=16384, hidden_size=512, intermediate_size=1536, num_hidden_layers=4,
                  num_attention_heads=8, num_key_value_heads=2, rope_parameters=dict(
                      rope_type="default", rope_theta=1e6, mrope_section=[8, 12, 12])),
        patches=(32, 32), words=58, new_tokens=[128], tie_word_embeddings=False),
    "3b": dict(
        vision=dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=2048),
        text=dict(vocab_size=151936, hidden_size=2048, intermediate_size=11008, num_hidden_layers=36,
                  num_attention_heads=16, num_key_value_heads=2, rope_parameters=dict(
                      rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24])),
        patches=(64, 80), words=58, new_tokens=[512, 1024], tie_word_embeddings=True),
}


def random_policy(shape, device):
    """A Qwen2.5-VL with random weights and a prompt for it: an image of noise between random words."""
    vision, text, (rows, columns) = shape["vision"], shape["text"], shape["patches"]
    config = Qwen2_5_VLConfig(
        text_config=dict(text, bos_token_id=None, eos_token_id=None, pad_token_id=0), vision_config=vision,
        tie_word_embeddings=shape["tie_word_embeddings"], image_token_id=1, video_token_id=2,
        vision_start_token_id=3, vision_end_token_id=4)
    torch.manual_seed(0)
    with torch.device(device):
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        model = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(5, text["vocab_size"], (shape["words"],), generator=generator)
    image = torch.full((rows * columns // 4,), 1)
    ids = torch.cat([words[:20], torch.tensor([3]), image, torch.tensor([4]), words[22:]]).to(device)
    grid = torch.tensor([[1, rows, columns]], device=device)
    pixels = torch.rand(rows * columns, 1176, generator=generator).to(device)
    positions, _ = model.model.get_rope_index(ids[None], (ids == 1).int()[None], grid)
    prompt = dipr1.Prompt(0, {}, ids, positions[:, 0], pixels, grid, 14 * columns, 14 * rows, boxes(), boxes())
    return dipr1.Policy(model, range(text["vocab_size"])), prompt


def naive_rollout(policy, prompt, G, new_tokens):
    """`generate`, which reads image and prompt G times."""
    ids = prompt.ids[None]
    out = policy.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=(ids == 1).int(),
        pixel_values=prompt.pixels, image_grid_thw=prompt.grid, num_return_sequences=G, do_sample=True, top_k=0,
        min_new_tokens=new_tokens, max_new_tokens=new_tokens, suppress_tokens=[1, 2, 3, 4], use_cache=True)
    return Group(prompt, list(out[:, ids.shape[1]:]))


def our_rollout(policy, prompt, G, new_tokens):
    """`rollout`, with an EOS that never comes."""
    encoder = SimpleNamespace(eos=[-1], decode=lambda ids: "")
    uniforms = dipr1.draw_uniforms(0, 0, 0, (G, new_tokens))[None]
    (group,) = dipr1.rollout(policy, encoder, [prompt], new_tokens, uniforms)
    return group


class Stopwatch:
    """Seconds by stage, with the tower images and language-model tokens that went through the model."""

    def __init__(self, policies, device):
        self.device, self.seconds, self.images, self.tokens = device, {}, 0, 0
        for policy in policies:
            policy.model.model.visual.register_forward_pre_hook(self.count_images, with_kwargs=True)
            policy.model.get_input_embeddings().register_forward_pre_hook(self.count_tokens)

    def count_images(self, _, args, kwargs):
        self.images += len(kwargs.get("grid_thw", args[-1]))

    def count_tokens(self, _, args):
        self.tokens += args[0].numel()

    @contextlib.contextmanager
    def __call__(self, stage):
        synchronize = torch.cuda.synchronize if self.device == "cuda" else lambda: None
        synchronize()
        started = time.perf_counter()
        yield
        synchronize()
        self.seconds[stage] = time.perf_counter() - started


def one_step(policy, reference, prompt, G, new_tokens, naive, frozen, watch):
    """Rollout, reference, policy forward and backward of one group."""
    prompt.features = None
    with watch("rollout"):
        if frozen and not naive:
            dipr1.keep_features(policy, [prompt])
        group = (naive_rollout if naive else our_rollout)(policy, prompt, G, new_tokens)
    score = plain_logprobs if naive else lambda model, group: model([group])
    with watch("reference"), torch.no_grad():
        ref = score(reference, group)
    with watch("policy forward"):
        logp = score(policy, group)
    with watch("backward"):
        advantages = torch.linspace(-1, 1, len(logp), device=logp.device)
        dipr1.grpo_loss(logp, logp.detach(), ref, advantages, 0.2, 0.04)[0].backward()
    policy.zero_grad()
    return group


def added_memory(policy, group, naive, device):
    """Bytes that a policy forward adds at its peak, kept for the backward or not."""
    score = plain_logprobs if naive else lambda model, group: model([group])
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = score(policy, group)  # noqa: F841
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profiler:
        kept = score(policy, group)  # noqa: F841
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def benchmark(shape, G, new_tokens, repeats, device, towers=("trained", "frozen")):
    """Measure both ways, turn by turn, and print the table: medians, and naive over ours."""
    policy, prompt = random_policy(shape, device)
    reference = copy.deepcopy(policy).eval().requires_grad_(False)
    watch, found = Stopwatch((policy, reference), device), {}
    for tower in towers:
        frozen = tower == "frozen"
        policy.model.model.visual.requires_grad_(not frozen)
        for _ in tqdm(range(repeats + 1), f"G {G}, {new_tokens} new tokens, tower {tower}"):
            for naive in (True, False):
                watch.images = watch.tokens = 0
                for model in (policy, reference):
                    model.model.model.language_model.set_attn_implementation("sdpa" if naive else "tree")
                group = one_step(policy, reference, prompt, G, new_tokens, naive, frozen, watch)
                rows = dict(watch.seconds, scoring=sum(watch.seconds.values()) - watch.seconds["rollout"])
                rows["whole step"] = sum(watch.seconds.values())
                if frozen:
                    rows = {"whole step, tower frozen": rows["whole step"]}
                else:
                    rows |= {"tower images": watch.images, "language-model tokens": watch.tokens}
                for name, value in rows.items():
                    found.setdefault(name, ([], []))[naive].append(value)
    policy.model.model.visual.requires_grad_(True)
    prompt.features = None
    for naive in (True, False):
        policy.model.model.language_model.set_attn_implementation("sdpa" if naive else "tree")
        found.setdefault("added memory, MB", ([], []))[naive].append(added_memory(policy, group, naive, device) / 1e6)
    print(f"\n{sum(p.numel() for p in policy.parameters()) / 1e6:.0f}M parameters, prompt {len(prompt.ids)} tokens, "
          f"G = {G}, {new_tokens} new tokens each: " + (f"medians of {repeats}" if repeats else "measured once"))
    print(f"{'':<28}{'naive':>10}{'ours':>10}{'ratio':>8}")
    for name, (ours, naive) in found.items():
        a, b = (np.median(values[1:] or values) for values in (naive, ours))  # the first round warms up
        digits = 3 if name.startswith(("roll", "ref", "pol", "back", "scor", "whole")) else 0
        print(f"{name:<28}{a:>10.{digits}f}{b:>10.{digits}f}{a / b:>8.1f}")


def main():
    parser = argparse.ArgumentParser(description="Time the naive way and ours, side by side.")
    parser.add_argument("--shapes", choices=SHAPES, default="small", help="3b wants a GPU of 80 GB")
    parser.add_argument("--repeats", type=int, default=5,
                        help="medians of so many, after a first that warms up (default 5; 0: the first alone)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--growth", action="store_true", help="also for G = 4 .. 32 and 64 .. 512 new tokens")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device, shape = "cuda" if torch.cuda.is_available() else "cpu", SHAPES[args.shapes]
    for new_tokens in shape["new_tokens"]:
        benchmark(shape, 8, new_tokens, args.repeats, device)
    for G, new_tokens in ((4, 128), (16, 128), (32, 128), (8, 64), (8, 256), (8, 512)) if args.growth else ():
        benchmark(shape, G, new_tokens, args.repeats, device, towers=["trained"])


if __name__ == "__main__":
    main()
