"""Training of a whole model towards another, in memory."""

from collections import Counter
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from slimlm.calibration import Windows
from slimlm.checkpoint.kin import Kin
from slimlm.errors import RunFailure
from slimlm.linalg.likelihood import divergence
from slimlm.linalg.softmax import cosine
from slimlm.model.whole import recompute
from slimlm.progress import Progress
from slimlm.ranks import ALONE
from slimlm.recover import training as module
from slimlm.recover.losses import StreamLoss, text_loss
from slimlm.recover.optimizers import BETAS, MFAC
from slimlm.recover.teacher import Beside, Remembered, likeliest_of
from slimlm.recover.text import Text
from slimlm.recover.training import WARM_UP, Schedule, Training
from tests.conftest import CONFIGS, random_tokens
from tests.families.configs import family_config

STEPS = Schedule(steps=6, size=4, rate=1e-3, seed=0)


@pytest.fixture(autouse=True)
def in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "training_dtype", lambda device: torch.float32)


def model(seed: int, name: str = "llama") -> PreTrainedModel:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(CONFIGS[name]).float().eval()


def text(windows: int = 20) -> Text:
    tokens = random_tokens(windows, 12)
    return Text.of(Windows(tokens, "a", None, tuple("ab"[index % 2] for index in range(windows))))


def trained(schedule: Schedule = STEPS, student: PreTrainedModel | None = None, **how) -> Training:
    found = Training(student or model(1), Beside(model(0)), text(), schedule, ALONE, **how)
    found.run(lambda: None, Progress())
    return found


def by_hand(
    student: PreTrainedModel, teacher: PreTrainedModel, schedule: Schedule, streams: StreamLoss | None = None
) -> dict[str, Tensor]:
    """Its weights after a loop that a textbook would have: all windows of a step at once."""
    own = text()
    adam = torch.optim.AdamW(student.parameters(), lr=1.0, betas=BETAS, weight_decay=0)
    for step in range(schedule.steps):
        tokens = own.tokens[own.of_step(step, schedule.size, schedule.seed)]
        if schedule.is_kl:
            wanted = teacher(input_ids=tokens).logits.detach().softmax(-1)
            logs = student(input_ids=tokens).logits.log_softmax(-1)
            loss = (wanted * (wanted.log() - logs)).sum() / tokens.numel()
        else:
            chosen = student(input_ids=tokens).logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])
            loss = -chosen.sum() / tokens.numel()
        if streams:
            states = [one(input_ids=tokens, output_hidden_states=True).hidden_states for one in (student, teacher)]
            loss = loss + cosine(step / schedule.steps) * streams(*states) / tokens.numel()
        warm = min(1.0, (step + 1) / (WARM_UP * schedule.steps))
        adam.param_groups[0]["lr"] = schedule.rate * warm * cosine(step / schedule.steps)
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        adam.step()
    return dict(student.named_parameters())


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
@pytest.mark.parametrize("is_kl", [True, False])
def test_it_is_adamw_on_the_mean_loss_of_a_step(name: str, is_kl: bool):
    schedule = Schedule(40, STEPS.size, STEPS.rate, STEPS.seed, is_kl)
    assert WARM_UP * schedule.steps > 1
    found = Training(model(1, name), Beside(model(0, name)), text(), schedule, ALONE)
    for _ in range(schedule.steps):
        found._step()
    expected = by_hand(model(1, name), model(0, name), schedule)
    for key, weight in found.changed.items():
        torch.testing.assert_close(weight, expected[key], rtol=5e-3, atol=1e-3)


def test_the_divergence_is_the_sum_of_p_log_p_over_q():
    p, q = torch.randn(2, 3, 7, dtype=torch.float64), torch.randn(2, 3, 7, dtype=torch.float64)
    wanted = sum(
        float(one.softmax(0) @ (one.softmax(0) / other.softmax(0)).log())
        for one, other in zip(p.flatten(0, 1), q.flatten(0, 1), strict=True)
    )
    assert float(divergence(q, p)) == pytest.approx(wanted, rel=1e-5)
    assert float(divergence(p, p)) == pytest.approx(0, abs=1e-6)


def test_the_loss_of_a_text_is_of_the_tokens_after_the_first():
    logits, tokens = torch.randn(2, 5, 11), random_tokens(2, 5) % 11
    wanted = -sum(
        float(logits[row, place].log_softmax(-1)[tokens[row, place + 1]]) for row in range(2) for place in range(4)
    )
    assert float(text_loss(logits, tokens)) == pytest.approx(wanted, rel=1e-5)


def test_what_is_zero_in_a_matrix_stays_zero_after_every_step(monkeypatch: pytest.MonkeyPatch):
    student = model(1)
    masks = {}
    with torch.no_grad():
        for name, weight in student.named_parameters():
            if name.endswith("proj.weight"):
                masks[name] = torch.rand_like(weight) < 0.5
                weight[masks[name]] = 0
    steps, real = [], Training._step

    def watched(self: Training) -> float:
        loss = real(self)
        steps.append(all(bool((self.changed[name][mask] == 0).all()) for name, mask in masks.items()))
        steps.append(all(bool((self.changed[name][~mask] != 0).all()) for name, mask in masks.items()))
        return loss

    monkeypatch.setattr(Training, "_step", watched)
    before = {name: weight.detach().clone() for name, weight in student.named_parameters()}
    found = trained(student=student)
    assert len(steps) == 2 * STEPS.steps
    assert all(steps)
    assert found.fixed.keys() == masks.keys()
    assert found.zeros == sum(int(mask.sum()) for mask in masks.values())
    assert all(not torch.equal(weight, before[name]) for name, weight in found.changed.items())


def test_what_is_to_stay_does():
    student = model(1)
    name = "model.layers.0.mlp.up_proj.weight"
    before = student.get_parameter(name).detach().clone()
    found = trained(student=student, stays={name: []})
    assert torch.equal(student.get_parameter(name), before)
    assert name not in found.best


def test_rows_that_are_to_stay_do():
    student = model(1)
    name = "model.layers.0.mlp.up_proj.weight"
    before = student.get_parameter(name).detach().clone()
    found = trained(student=student, stays={name: [1, 3]})
    same = (student.get_parameter(name) == before).all(1)
    assert same.nonzero().flatten().tolist() == [1, 3]
    assert name in found.best


def test_models_that_diverge_by_no_number_are_refused():
    teacher = model(0)
    with torch.no_grad():
        teacher.get_parameter("model.norm.weight")[0] = torch.nan
    with pytest.raises(RunFailure, match="one of them is broken"):
        Training(model(1), Beside(teacher), text(), STEPS, ALONE).run(lambda: None, Progress())


def test_a_training_that_breaks_ends_and_leaves_numbers_only(monkeypatch: pytest.MonkeyPatch):
    real = Training._step

    def breaking(self: Training) -> float:
        real(self)
        with torch.no_grad():
            next(iter(self.changed.values())).fill_(torch.nan)
        return float("nan")

    monkeypatch.setattr(Training, "_step", breaking)
    found = trained(Schedule(16, 4, 1e-3, 0))
    assert found.state.step == 2
    assert found.state.best_step == 0
    assert found.state.history[-1] == {"step": 2}


def test_it_gets_better_and_the_best_weights_are_the_ones_judged_best():
    found = trained(Schedule(40, 4, 3e-3, 0))
    held = [(one["held out a"] + one["held out b"]) / 2 for one in found.state.history]
    assert min(held) < 0.9 * held[0]
    assert found.state.best == pytest.approx(min(held))
    assert found.state.history[held.index(min(held))]["step"] == found.state.best_step
    student = model(1)
    student.load_state_dict(found.best, strict=False)
    with torch.no_grad():
        losses = [
            float(divergence(student(input_ids=tokens).logits, model(0)(input_ids=tokens).logits)) / tokens.numel()
            for tokens in (found.text.tokens[numbers] for numbers in found.text.held.values())
        ]
    assert sum(losses) / 2 == pytest.approx(found.state.best, rel=1e-4)


def test_held_out_text_that_only_gets_worse_ends_it_and_leaves_what_came_in(monkeypatch: pytest.MonkeyPatch):
    said = iter(range(1, 100))
    monkeypatch.setattr(Training, "_divergences", lambda self: {"a": float(next(said))})
    before = {name: weight.detach().clone() for name, weight in model(1).named_parameters()}
    found = trained(Schedule(80, 4, 1e-3, 0))
    assert found.state.best_step == 0
    assert found.state.step == module.PATIENCE * 80 // module.JUDGED
    assert all(torch.equal(weight, before[name]) for name, weight in found.best.items())


def test_a_rate_that_ruins_it_at_first_is_given_time_to_fall():
    found = trained(Schedule(80, 4, 1.0, 0))
    first, *later = [(one["held out a"] + one["held out b"]) / 2 for one in found.state.history]
    assert min(later[: module.PATIENCE]) > first > later[-1]
    assert found.state.best_step == found.state.step == 80


def test_every_window_is_seen_once_before_any_is_again():
    own = Text(torch.zeros(20, 1), torch.arange(10), {})
    seen = torch.cat([own.of_step(step, 4, 7).flatten() for step in range(5)])
    assert sorted(seen[:10].tolist()) == list(range(10))
    assert sorted(seen[10:].tolist()) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()
    assert seen[:10].tolist() != torch.cat([own.of_step(step, 4, 8).flatten() for step in range(3)])[:10].tolist()


def test_windows_of_every_kind_are_held_out_and_not_learned_from():
    tokens = torch.arange(40)[:, None].expand(40, 3).contiguous()
    windows = Windows(tokens, "x", None, ("/some/a.txt",) * 25 + ("self",) * 10 + ("/other/a.txt",) * 5)
    own = Text.of(windows)
    assert {name: len(held) for name, held in own.held.items()} == {"a.txt": 5, "self": 2, "/other/a.txt": 1}
    held = torch.cat(list(own.held.values())).tolist()
    assert sorted(held + own.learned.tolist()) == list(range(40))
    assert max(own.held["a.txt"]) < 25 <= min(own.held["self"])
    again = Counter(Text.of(windows, 3).learned.tolist())
    assert again == {number: 1 if number in range(25, 35) else 3 for number in own.learned.tolist()}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_changes_of_low_rank_are_merged_into_what_they_computed(name: str):
    torch.manual_seed(0)
    student = (
        AutoModelForCausalLM.from_config(family_config("gpt2") if name == "gpt2" else CONFIGS[name]).float().eval()
    )
    matrices = [
        key for key, one in student.named_modules() if isinstance(one, nn.Linear | Conv1D) and "head" not in key
    ]
    with torch.no_grad():
        for key in matrices:
            weight = student.get_submodule(key).weight
            weight[torch.rand_like(weight) < 0.5] = 0
    before = {key: one.detach().clone() for key, one in student.state_dict().items()}
    teacher = model(0) if name == "llama" else AutoModelForCausalLM.from_config(student.config).float().eval()
    schedule = Schedule(6, 4, 1e-2, 0, rank=2)
    stays = {f"{matrices[0]}.weight": list[int]()}
    found = Training(student, Beside(teacher), text(), schedule, ALONE, stays, matrices)
    found.run(lambda: None, Progress())
    tokens = random_tokens(2, 12)
    found.state.best = float("inf")
    found._judge([], Progress(), 0.0)  # whatever was best, the last step's weights are looked at here
    with torch.no_grad():
        trained = student(input_ids=tokens).logits
    assert found.best.keys() == {f"{key}.weight" for key in matrices[1:]}
    merged = AutoModelForCausalLM.from_config(student.config).float().eval()
    merged.load_state_dict(before)
    with torch.no_grad():
        for key, weight in found.best.items():
            owner = merged.get_submodule(key.removesuffix(".weight"))
            new = weight.T if isinstance(owner, Conv1D) else weight
            assert torch.equal(new == 0, owner.weight == 0)
            b, a = (found.changed[key.replace(".weight", end)] for end in (".b", ".a"))
            assert torch.linalg.matrix_rank(b @ a) == 2
            owner.weight.copy_(new)
        torch.testing.assert_close(merged(input_ids=tokens).logits, trained, rtol=0, atol=1e-5)
    assert not torch.equal(merged.state_dict()[f"{matrices[1]}.weight"], before[f"{matrices[1]}.weight"])


def first_gradients(found: Training) -> dict[str, Tensor]:
    return dict(zip(found.changed, found._gradients(0)[1], strict=True))


def test_a_teacher_that_is_remembered_is_the_one_beside_where_all_tokens_are():
    teacher, own = model(0), text()
    count = teacher.config.vocab_size
    remembered = Remembered(likeliest_of(teacher, own.tokens, count, torch.float32, ALONE, Progress()))
    wanted = first_gradients(Training(model(1), Beside(teacher), own, STEPS, ALONE))
    same = first_gradients(Training(model(1), remembered, own, STEPS, ALONE))
    for name, gradient in wanted.items():
        assert (same[name] - gradient).norm() < 0.01 * gradient.norm(), name


def test_what_is_computed_again_gives_the_same_gradients():
    student = model(1)
    calls = []
    recompute(student.model.layers)
    student.model.layers[0].self_attn.register_forward_hook(lambda *given: calls.append(torch.is_grad_enabled()))
    again = first_gradients(Training(student, Beside(model(0)), text(), STEPS, ALONE))
    once = first_gradients(Training(model(1), Beside(model(0)), text(), STEPS, ALONE))
    assert len(calls) == 2 * 4  # of four lanes
    for name, gradient in once.items():
        assert torch.equal(again[name], gradient), name


@pytest.mark.parametrize("block", [0, 100])
def test_mfac_steps_by_the_inverse_fisher_matrix_of_its_gradients(block: int):
    count, damping, rate = 3, 0.01, 0.05
    schedule = Schedule(7, 4, rate, 0, optimizer=partial(MFAC, count=count, damping=damping, size=block))
    found = Training(model(1), Beside(model(0)), text(), schedule, ALONE)
    average, rows, eye = 0.0, torch.zeros(0), torch.eye(count, dtype=torch.float64)
    for step in range(schedule.steps):
        gradient = torch.cat([one.flatten() for one in found._gradients(step)[1]]).double()
        gradient /= max(1.0, float(gradient.norm()))
        rows = rows if len(rows) else torch.zeros(count, len(gradient), dtype=torch.float64)
        rows[step % count] = gradient
        size = block or len(gradient)
        moved = torch.cat(
            [
                (own - part.T @ torch.linalg.solve(damping * count * eye + part @ part.T, part @ own)) / damping
                for part, own in zip(rows.split(size, 1), gradient.split(size), strict=True)
            ]
        )
        average = 0.9 * average + 0.1 * moved
        before = torch.cat([one.detach().flatten() for one in found.changed.values()]).double()
        found._step()
        after = torch.cat([one.detach().flatten() for one in found.changed.values()]).double()
        now = rate * min(1.0, (step + 1) / (WARM_UP * schedule.steps)) * cosine(step / schedule.steps)
        torch.testing.assert_close(after - before, -now * average, rtol=1e-3, atol=1e-6)


def test_streams_count_in_the_basis_they_were_cut_by():
    states = [torch.randn(2, 3, 4) for _ in range(4)]
    wanted = [torch.randn(2, 3, 6) for _ in range(6)]
    basis = torch.linalg.qr(torch.randn(6, 4))[0]
    kin = Kin(basis, torch.tensor([0, 2, 4]))
    pairs = [(1, 1), (2, 3)]  # behind the student's blocks 0 and 1; the last block's is behind the norm
    errors = [
        (states[own][w, t] - wanted[other][w, t] @ basis).square().sum() / (wanted[other][w, t] @ basis).square().sum()
        for own, other in pairs for w in range(2) for t in range(3)
    ]  # fmt: skip
    torch.testing.assert_close(StreamLoss(0.5, kin, False)(states, wanted), 0.5 * sum(errors) / 2)
    moved = [one + 3.0 for one in states]
    eye = Kin(torch.eye(4), torch.arange(4))
    centred = StreamLoss(1.0, eye, True)
    torch.testing.assert_close(centred(moved, states), torch.tensor(0.0), rtol=0, atol=1e-5)
    assert StreamLoss(1.0, eye, False)(moved, states) > 1


def test_streams_count_for_as_much_as_is_left_of_the_rate():
    student = model(1)
    kin = Kin(torch.eye(student.config.hidden_size), torch.arange(len(student.model.layers)))
    streams = StreamLoss(2.0, kin, False)
    schedule = Schedule(40, STEPS.size, STEPS.rate, STEPS.seed)
    found = Training(student, Beside(model(0)), text(), schedule, ALONE, streams=streams)
    for _ in range(schedule.steps):
        found._step()
    expected = by_hand(model(1), model(0), schedule, streams)
    constant = by_hand(model(1), model(0), schedule, StreamLoss(1.0, kin, False))
    for key, weight in found.changed.items():
        torch.testing.assert_close(weight, expected[key], rtol=5e-3, atol=1e-3)
    assert any(not torch.allclose(constant[key], expected[key], rtol=5e-3, atol=1e-3) for key in expected)


def test_streams_come_nearer_where_they_count():
    def distance(found: Training) -> float:
        with torch.no_grad():
            tokens = found.text.tokens[:4].long()
            ends = [one(input_ids=tokens, output_hidden_states=True) for one in (found.student, model(0))]
        return float(StreamLoss(1.0, kin, False)(*(one.hidden_states for one in ends)))

    student = model(0)
    kin = Kin(torch.eye(student.config.hidden_size), torch.arange(len(student.model.layers)))
    schedule = Schedule(30, 4, 1e-3, 0)
    alone = trained(schedule)
    looked = trained(schedule, streams=StreamLoss(1.0, kin, False))
    assert distance(looked) < 0.8 * distance(alone)


def test_mfac_that_can_make_no_step_leaves_what_was_best():
    schedule = Schedule(16, 4, 1e-3, 0, optimizer=partial(MFAC, count=2, damping=1e-3))
    found = Training(model(1), Beside(model(0)), text(), schedule, ALONE)
    real, lines = found._gradients, list[str]()

    def broken(step: int) -> tuple[float, list[Tensor]]:
        loss, gradients = real(step)
        return loss, [one * torch.nan if step == 3 else one for one in gradients]

    class Told(Progress):
        def line(self, text: str) -> None:
            lines.append(text)

    found._gradients = broken  # type: ignore[method-assign]
    found.run(lambda: None, Told())
    assert found.state.step == 3
    assert "ends after step 3: a Fisher matrix is not positive definite" in lines[-1]
    assert all(one.isfinite().all() for one in found.best.values())
