"""What can go wrong in DIP-R1, told as tests: `pytest test_dipr1.py`, on a laptop CPU, with a tiny random Qwen2.5-VL.

Each clever thing in dipr1.py is held against an independent, naive way of computing the same.
"""
import copy
import itertools
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm
from transformers import Qwen2_5_VLForConditionalGeneration

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
    "[[1, 2, 3, NaN]]", "[[1, 2, 3, Infinity]]", "[[1, 2, 3, " + "9" * 400 + "]]", "[[1 2, 3, 4, 5]]", '[{"bbox_2d": [1, 2, 3, 4]]',
    '{"bbox_2d": [1, 2, 3, 4]}', "[[1, 2, 3, 4]] and more", "[[__import__('os'), 2, 3, 4]]", "[[1e9, 2, 3, 4]]",
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


def test_accuracy_hacks_earn_less_than_honesty():
    gt = boxes(*[[20 * i, 0, 20 * i + 15, 40] for i in range(5)])
    honest = dipr1.accuracy_reward(gt[:4], gt)
    assert honest == pytest.approx(0.85)
    duplicates = np.repeat(gt[:4], 5, axis=0)
    assert dipr1.accuracy_reward(duplicates, gt) == pytest.approx(0.25 * 0.2 + 0.75 * 0.8)
    assert dipr1.accuracy_reward(gt[:1], gt) == pytest.approx(0.25 + 0.75 * 0.2)  # one safe box
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
    """What a careful user of transformers writes: a padded row a completion, each with a copy of the image."""
    prompt, longest = group.prompt, max(map(len, group.completions))
    rows = [torch.cat([prompt.ids, o, torch.zeros(longest - len(o), dtype=torch.long)]) for o in group.completions]
    ids, G = torch.stack(rows), len(rows)
    lengths = torch.tensor([len(prompt.ids) + len(o) for o in group.completions])
    logits = policy.model(
        input_ids=ids, attention_mask=(torch.arange(ids.shape[1]) < lengths[:, None]).long(),
        pixel_values=prompt.pixels.repeat(G, 1), image_grid_thw=prompt.grid.repeat(G, 1),
        mm_token_type_ids=(ids == policy.model.config.image_token_id).int(),
    ).logits.float() / policy.temperature
    logits[..., policy.forbidden] = -float("inf")
    logp = logits.log_softmax(-1)
    start = len(prompt.ids) - 1
    return torch.cat([logp[i, start + torch.arange(len(o)), o] for i, o in enumerate(group.completions)])


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
    policy, _, _ = load(tiny)
    hidden, targets = torch.randn(23, 128), torch.randint(0, 400, (23,))
    in_chunks, at_once = (policy.token_logprobs(hidden, targets, chunk) for chunk in (4, 99))
    assert torch.allclose(in_chunks, at_once)


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
    groups = dipr1.rollout(policy, encoder, prompts, 20, uniforms)
    with torch.no_grad():
        scored = policy(groups)
    assert torch.allclose(torch.cat([group.rollout_logp for group in groups]), scored, atol=1e-4)


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
    total = policy.logprobs(torch.randn(3, 128)).exp()
    assert torch.allclose(total.sum(-1), torch.ones(3)) and (total[:, policy.forbidden] == 0).all()


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
    crowded = dipr1.parse_response(encoder.decode(encoder.target(prompts[3]))).look
    assert len(crowded) == 2  # of three people, the two who overlap


def test_every_epoch_takes_each_record_once_in_an_order_of_its_own():
    steps = [dipr1.batch_indices(10, 5, seed=0, step=s) for s in range(4)]
    assert sorted(steps[0] + steps[1]) == sorted(steps[2] + steps[3]) == list(range(10))
    assert steps[0] + steps[1] != steps[2] + steps[3]
    assert steps == [dipr1.batch_indices(10, 5, seed=0, step=s) for s in range(4)]
    assert len(dipr1.batch_indices(3, 8, seed=0, step=0)) == 8  # fewer records than a batch holds


@pytest.mark.parametrize("line", [
    "{", "[]", '{"image": "x.png"}', '{"image": "x.png", "width": 5, "height": 5, "boxes": [[1, 2]]}',
    '{"image": "x.png", "width": 0, "height": 5, "boxes": []}',
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
        encoder.prompt(0, record | {"image": str(tmp_path / "cut.png")})
    with pytest.raises(SystemExit, match="0.png is .112, 112., but.*.50, 112."):  # no box would fit
        encoder.prompt(0, record | {"image": str(tiny[1].parent / "0.png"), "width": 50})


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


def worker(rank, tiny, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = [three_steps(tiny, rank, 2, **scenario) for scenario in SCENARIOS]
    torch.save(results, f"{folder}/rank-{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_end_with_the_weights_of_one(tiny, tmp_path):
    """Also where one rank's groups all have zero advantage, with a frozen tower, with two updates a rollout."""
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


def test_frozen_features_are_computed_once_a_step(tiny, monkeypatch):
    seen = []
    see = dipr1.Policy.see
    monkeypatch.setattr(dipr1.Policy, "see", lambda self, prompts: seen.append(len(prompts)) or see(self, prompts))
    apart = [2, 1, 1, 1, 1]  # the rollout, then reference and policy for each group
    for freeze, passes in ((True, [2]), (False, apart)):
        policy, encoder, prompts = load(tiny, freeze_vision=freeze)
        seen.clear()
        cfg = step_config(freeze_vision=freeze)
        reference, optimizer = copy.deepcopy(policy).eval(), dipr1.make_optimizer(policy)
        dipr1.grpo_step(policy, reference, optimizer, encoder, prompts[:2], cfg, 0, 1e-4)
        assert seen == passes


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
    log, bar, metrics = dipr1.Log(tmp_path), tqdm(disable=True), {"loss": float("nan"), "skipped": 1.0}
    for step in range(9):
        log.write("grpo", step, metrics, bar)
    log.write("grpo", 9, metrics | {"skipped": 0.0}, bar)
    for step in range(10, 19):
        log.write("grpo", step, metrics, bar)
    with pytest.raises(SystemExit, match="grpo step 19: ten gradients in a row"):
        log.write("grpo", 19, metrics, bar)


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


def test_sft_learns_a_scene_by_heart_and_the_evaluation_sees_it(tiny):
    policy, encoder, prompts = load(tiny)
    optimizer = dipr1.make_optimizer(policy)
    cfg = Config(groups_per_forward=1, group_size=4, max_new_tokens=80, batch_size=2)
    records = [p.record for p in prompts[:4]]
    assert dipr1.evaluate(policy, encoder, records, cfg)["f1"] == 0
    for _ in range(80):
        metrics = dipr1.sft_step(policy, optimizer, encoder, prompts[:4], cfg, 3e-3)
    assert metrics["loss"] < 0.1
    figures = dipr1.evaluate(policy, encoder, records, cfg)
    assert figures["f1"] == figures["jaccard"] == figures["format_rate"] == 1
    people = np.mean([len(p.truth) for p in prompts[:4]])
    assert figures["boxes_per_image"] == figures["truth_boxes_per_image"] == people


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

    checkpoint = tmp_path / "checkpoint-000002"
    names = {path.name for path in checkpoint.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json", "dipr1.json",
            "optimizer-0.pt", "optimizer-1.pt"} <= names
    assert not list(tmp_path.glob("*.tmp"))
    Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint)
    for rank in (0, 1):
        assert torch.load(checkpoint / f"optimizer-{rank}.pt", weights_only=True)["masters"]

    shown = run("dipr1.py", "--eval", "--model", checkpoint, "--data", tiny[1],
                "--output_dir", tmp_path / "eval", *small[:4])
    figures = json.loads((tmp_path / "eval" / "eval.json").read_text())
    assert {"precision", "recall", "f1", "jaccard", "format_rate", "look_reward", "boxes_per_image",
            "truth_boxes_per_image"} <= set(figures) and "jaccard" in shown
    again = run("dipr1.py", "--model", tiny[0], "--data", tiny[1], "--output_dir", tmp_path, expect=1)
    assert "holds a run already" in again and "Traceback" not in again


def test_the_demo_end_to_end_in_small(tmp_path, monkeypatch):
    monkeypatch.setattr(dipr1, "DEMO_SCENES", 12)
    monkeypatch.setattr(dipr1, "DEMO_HELD_OUT", 4)
    dipr1.main(["--demo", "--output_dir", str(tmp_path), "--seed", "3", "--sft_steps", "2", "--steps", "1",
                "--prompts_per_step", "2", "--group_size", "2", "--picture_every", "1", "--max_new_tokens", "16"])
    summary = json.loads((tmp_path / "summary.json").read_text())
    names = {"precision", "recall", "f1", "jaccard", "format_rate", "look_reward", "boxes_per_image",
             "truth_boxes_per_image", "sampled_f1", "sampled_look_reward"}
    assert summary["seed"] == 3 and summary["seconds"] > 0 and set(summary["sft"]) == set(summary["dipr1"]) == names
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3 and list((tmp_path / "pictures").iterdir())


def test_what_is_missing_is_said_in_a_line_with_the_remedy(tiny, tmp_path):
    message = run("dipr1.py", "--data", tmp_path / "no.jsonl", "--output_dir", tmp_path / "o", expect=1)
    assert "data_prep.py crowdhuman" in message and "--demo" in message and "Traceback" not in message
    (tmp_path / "model").mkdir()
    message = run("dipr1.py", "--model", tmp_path / "model", "--data", tiny[1],
                  "--output_dir", tmp_path / "o", expect=1)
    assert "cannot load --model" in message and "Traceback" not in message


def test_a_checkpoint_cut_short_is_an_error_in_a_line(tiny, tmp_path):
    for path in tiny[0].iterdir():
        content = path.read_bytes()
        (tmp_path / path.name).write_bytes(content[: len(content) // 2] if path.suffix == ".safetensors" else content)
    with pytest.raises(SystemExit, match="cannot load --model"):
        dipr1.load_model(Config(model=str(tmp_path)), torch.device("cpu"))


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


def crowdhuman_fixture(root, lines, size=(100, 80)):
    (root / "Images").mkdir(parents=True)
    for line in lines:
        Image.new("RGB", size).save(root / "Images" / f"{json.loads(line)['ID']}.jpg")
    (root / "annotation_train.odgt").write_text("\n".join(lines) + "\n")


def person(fbox, tag="person", **extra):
    return {"tag": tag, "fbox": fbox, "extra": extra, "head_attr": {"ignore": 1}}


def test_crowdhuman_converts(tmp_path, capsys):
    people = [person([10, 10, 20, 30]), person([90, 70, 40, 40]), person([5, 5, -3, 9]),
              person([0, 0, 9, 9], ignore=1), person([50, 0, 9, 9], tag="mask"),
              {"tag": "person", "fbox": [1, 2, 3, 4]}]
    crowds = {"1,a": people, "2,b": [person([0, 0, 5, 5])] * 61, "3,c": []}
    crowdhuman_fixture(tmp_path / "ch", [json.dumps({"ID": i, "gtboxes": b}) for i, b in crowds.items()])
    whole = (tmp_path / "ch/Images/3,c.jpg").read_bytes()
    out = tmp_path / "elsewhere" / "train.jsonl"
    data_prep.main(["crowdhuman", str(tmp_path / "ch"), "--split", "train", "--out", str(out), "--draw", "1"])
    first, empty = dipr1.load_records(out)
    # The second is clipped, the one of negative width dropped; a person without the optional keys counts.
    assert first["boxes"].tolist() == [[10, 10, 30, 40], [90, 70, 100, 80], [1, 2, 4, 6]]
    assert first["ignore"].tolist() == [[0, 0, 9, 9], [50, 0, 59, 9]]
    assert dipr1.open_image(first["image"]).size == (first["width"], first["height"]) == (100, 80)
    assert len(empty["boxes"]) == 0 and (out.parent / "train-0.png").exists()
    said = capsys.readouterr().out
    assert "2 images, 3 boxes" in said and "image with more than 60 boxes" in said and "box without area" in said

    (tmp_path / "ch/Images/3,c.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "ch/Images/2,b.jpg").unlink()
    data_prep.main(["crowdhuman", str(tmp_path / "ch"), "--split", "train", "--out", str(out)])
    said = capsys.readouterr()
    assert "3,c.jpg" in said.err and "2,b.jpg" in said.err and "2 x image missing or unreadable" in said.out


def test_crowdhuman_says_where_it_is_malformed_and_leaves_no_file(tmp_path):
    crowdhuman_fixture(tmp_path, [json.dumps({"ID": "1", "gtboxes": []})])
    with open(tmp_path / "annotation_train.odgt", "a") as file:
        file.write('{"ID": "2", "gtboxes": [{"tag": "person"}]}\n')
    convert = ["crowdhuman", str(tmp_path), "--split", "train", "--out", str(tmp_path / "o.jsonl")]
    with pytest.raises(SystemExit, match="annotation_train.odgt, line 2"):
        data_prep.main(convert)
    (tmp_path / "annotation_train.odgt").write_text('{"ID": "gone", "gtboxes": []}\n')
    with pytest.raises(SystemExit, match="nothing converted"):
        data_prep.main(convert)
    with pytest.raises(SystemExit, match="annotation_val.odgt"):
        data_prep.main([*convert[:2], "--split", "val", *convert[4:]])
    assert not (tmp_path / "o.jsonl").exists()


@pytest.mark.skipif(not REAL.exists(), reason="needs the real annotation files")
def test_the_real_crowdhuman_line_trains(tiny, tmp_path):
    """The road from real annotations to two training steps, with a picture of the right size in the image's place."""
    crowdhuman_fixture(tmp_path / "ch", (REAL / "crowdhuman_train.odgt").read_text().splitlines(), size=(2048, 1356))
    data_prep.main(["crowdhuman", str(tmp_path / "ch"), "--split", "train", "--out", str(tmp_path / "train.jsonl")])
    (record,) = dipr1.load_records(tmp_path / "train.jsonl")
    assert len(record["boxes"]) == 6 and len(record["ignore"]) == 1
    assert record["boxes"][:, 3].max() == 1356  # annotated down to 2041
    dipr1.main(["--model", str(tiny[0]), "--data", str(tmp_path / "train.jsonl"),
                "--output_dir", str(tmp_path / "run"), "--steps", "2", "--prompts_per_step", "1",
                "--group_size", "2", "--max_new_tokens", "8", "--max_pixels", "100000"])
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
