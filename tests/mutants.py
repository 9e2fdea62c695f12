"""Bugs planted in the training wing, and the quick tests that must notice them: `python tests/mutants.py [word …]`.

Each line is data: what is changed in the source of a function, and which tests are then run, in a process of their own.
A mutant dies when one of them fails. The score is printed at the end; a mutant that lives needs a test, or a reason in
`EQUIVALENT`. The bugs that tests plant themselves (`BUGS` in test_ppo, test_oracle, test_twins, test_splits) belong to
the list too: each of them is a test that fails when its bug is not caught."""

import importlib
import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

LOSS = "test_training.py::test_the_loss_is_trls"
PICK = "test_training.py::test_pick_takes_the_earliest_best_after_the_start"
GROUPS, REWARDS = "test_grpo.py::test_advantages", "test_grpo.py::test_rewards"
BY_HAND = "test_grpo.py::test_advantages_and_prompts_by_hand"
PROMPTS = "test_twins.py::test_the_prompts_are_those_of_the_rounds"
ENV, STUDENT, WHOLE = (
    "test_env.py::test_",
    "test_report.py::test_statistics_by_scipy",
    "test_report.py::test_a_verdict_wants",
)
BELOW, POWER = "test_report.py::test_a_rise_below", "test_report.py::test_what_could_have_been"
TWO_WAY, RATIO = "test_report.py::test_two_ways_by_hand", "test_report.py::test_a_ratio_by_simulation"
SPLIT, FREE = "test_report.py::test_a_fall_is_reading", "test_tradeoff.py::test_gradients_lie"
HELD, GOES_ON = "test_tradeoff.py::test_each_arm", "test_tradeoff.py::test_a_killed_training"
TWIN = "test_tradeoff.py::test_sft_that_goes_on"
CURVES, EQUAL = "test_tradeoff.py::test_curves_begin", "test_tradeoff.py::test_equal_success_by_hand"
DOMAINS = "test_domains.py::test_"
TURN, SAID = "test_said.py::test_a_turn_ends_once", "test_said.py::test_"

MUTANTS = {  # name: (module, owner or '', function, old, new, tests)
    "SFT learns the prompt too": (
        "sft",
        "_AnswerLoss",
        "compute_loss",
        "labels = inputs.pop('labels')",
        "labels = (inputs.pop('labels'), inputs['input_ids'])[1]",
        LOSS,
    ),
    "SFT takes a mean of means": (
        "sft",
        "_AnswerLoss",
        "compute_loss",
        "torch.as_tensor(num_items_in_batch)",
        "(labels != -100).sum()",
        LOSS,
    ),
    "SFT does not learn the first token": (
        "sft",
        "_AnswerLoss",
        "compute_loss",
        "answer.flatten()",
        "answer.flatten().where(torch.arange(answer.numel()) % answer.shape[1] > 0, -100)",
        LOSS,
    ),
    "SFT does not learn the end": (
        "sft",
        "_AnswerLoss",
        "compute_loss",
        "reduction='sum'",
        "reduction='sum', ignore_index=5",
        LOSS,
    ),
    "the latest best is picked": ("sft", "", "pick", "[False, True]", "[False, False]", PICK),
    "the beginning may be picked": ("sft", "", "pick", "curve['step'] > 0", "curve['step'] >= 0", PICK),
    "the worst is picked": ("sft", "", "pick", "[False, True]", "[True, True]", PICK),
    "the best of the trained rule is picked": ("sft", "", "pick", "'OOD'", "'ID'", PICK),
    "answers that lose words are taught": (
        "sft",
        "",
        "_unsayable",
        "if words",
        "if False",
        SAID + "answers_that_cannot",
    ),
    "answers that are read otherwise are taught": (
        "sft",
        "",
        "_unsayable",
        "back != answer and",
        "False and",
        SAID + "answers_that_the_tokenizer",
    ),
    "GRPO compares with other problems": ("grpo", "", "group_advantages", "rewards.mean(1", "rewards.mean(0", GROUPS),
    "RLOO has itself among its siblings": (
        "grpo",
        "",
        "group_advantages",
        "* rewards.shape[1] / (rewards.shape[1] - 1)",
        "* 1",
        GROUPS,
    ),
    "GRPO divides by the batch": ("grpo", "", "group_advantages", "scale == 'group'", "False", BY_HAND),
    "GRPO forgets the scale": (
        "grpo",
        "Verifier",
        "__call__",
        "self.scale * f.reward",
        "f.reward",
        "test_grpo.py::test_the_scale_of_rewards",
    ),
    "GRPO judges by another problem": (
        "grpo",
        "Verifier",
        "judge",
        "self.problems[problem]",
        "self.problems[0]",
        REWARDS,
    ),
    "GRPO asks for another problem": ("grpo", "", "prompt_dataset", "problem=i", "problem=0", BY_HAND),
    "GRPO plays one round again and again": (
        "grpo",
        "",
        "training_problems",
        "{config.seed}:{i}",
        "{config.seed}:0",
        "test_twins.py::test_the_prompts_of_GRPO",
    ),
    "GRPO takes chance for dropout": (
        "grpo",
        "",
        "_train",
        "no_dropout(network)",
        "None",
        SAID + "grpo_takes_chance_out",
    ),
    "the constant reward is none": (
        "twins",
        "ConstantReward",
        "verify",
        "reward=self.reward",
        "reward=0.0",
        "test_twins.py::test_a_constant_reward_leaves",
    ),
    "SFT is given what has no answer": ("twins", "", "answerable", "return False", "return True", PROMPTS),
    "SFT is given RL's last prompts": ("twins", "RLPrompts", "problems", "self.dealt[:n]", "self.dealt[-n:]", PROMPTS),
    "the end is looked for further on": ("play", "", "retry_ids", "ids[at + 1:]", "ids[at + 2:]", TURN),
    "the end is written twice": ("play", "", "retry_ids", "at is None or", "True or", TURN),
    "the template's end is none": ("models", "", "_ends", "template, *", "*", SAID + "the_templates_end_is_an_end"),
    "rewards that are no numbers pass": (
        "play",
        "",
        "_is_finite",
        "math.isfinite(x)",
        "True",
        SAID + "rewards_that_are",
    ),
    "anything is a verdict": ("play", "", "verdict", "if not all(", "if not any(", SAID + "a_verdict_that_is_none"),
    "a context has room for one more": (
        "models",
        "",
        "check_context",
        "tokens > length",
        "tokens > length + 1",
        SAID + "how_long_a_context_is",
    ),
    "answers that have ended are counted": (
        "play",
        "_Context",
        "__call__",
        "~ended",
        "ended.new_ones(len(ended))",
        SAID + "an_answer_that_fits",
    ),
    "padding is counted": (
        "play",
        "_Context",
        "__call__",
        "int(self.pads[counted].min())",
        "0",
        SAID + "an_answer_that_fits",
    ),
    "configs keep their dropout": ("models", "", "no_dropout", "m is not saved and", "False and", SAID + "no_chance"),
    "attributes keep their dropout": ("models", "", "no_dropout", "_still(m)", "None", SAID + "no_chance"),
    "the saved config loses its dropout": ("models", "", "no_dropout", "m is not saved and", "", SAID + "no_chance"),
    "an adapter's base is not looked at": (
        "models",
        "",
        "_digest",
        "if is_adapter(folder)",
        "if False",
        SAID + "what_a_digest_looks_at",
    ),
    "weights are not looked at": (
        "models",
        "",
        "_digest",
        "hashlib.file_digest(f, 'sha256').digest()",
        "b''",
        SAID + "an_unfinished_run_does_not",
    ),
    "a digest that differs is no matter": (
        "book",
        "",
        "_others",
        "None in",
        "True or None in",
        SAID + "an_unfinished_run",
    ),
    "old records are refused": (
        "book",
        "",
        "_others",
        "{'weights'} if None in",
        "{'weights'} if 0 in",
        SAID + "records_without",
    ),
    "only one name of a full disk": ("folders", "", "is_full", "or any(", "and any(", SAID + "a_full_disk_by_any_name"),
    "rounding is whitened": (
        "ppo",
        "",
        "whiten",
        "max(1e-08, 1e-06 * chosen.abs().max())",
        "1e-08",
        SAID + "a_constant_and",
    ),
    "silence is not told": (
        "ppo",
        "Learner",
        "told",
        "self.config.kl != 'reward'",
        "False",
        SAID + "a_round_whose_rewards",
    ),
    "an ace is eleven": ("env", "", "card_numbers", "1 if c == 'A'", "11 if c == 'A'", ENV),
    "the solver subtracts one way": ("env", "", "_values", "b - a, ", "", ENV),
    "the solver divides one way": ("env", "", "_partners", "target / a", "target * a", ENV),
    "the solver knows no zero": ("env", "", "_partners", "not a and (not target)", "False", ENV),
    "sums in products lose their parentheses": ("env", "", "_write", "inside_product and", "False and", ENV),
    "minus is turned around": ("env", "", "_apply", "a - b if", "b - a if", ENV),
    "zero divides": ("env", "", "_apply", "op == '/' and (not b)", "False", ENV),
    "operators group to the right": ("env", "", "_close", ">= _RANK[token]", "> _RANK[token]", ENV),
    "all operators bind alike": ("env", "", "_close", "_RANK[ops[-1]] >= _RANK[token]", "True", ENV),
    "numbers of any length are read": ("env", "", "_tokens", "len(number) > 6 or", "", ENV),
    "formulas of any length are read": ("env", "", "_tokens", "len(text) > MAX_FORMULA", "False", ENV),
    "a number may be used twice": ("env", "", "_number_errors", "used[n] > given[n]", "False", ENV),
    "a number may be left over": ("env", "", "_number_errors", "used[n] < given[n]", "False", ENV),
    "any value is right": ("env", "", "judge", "value != problem.target", "False", ENV),
    "wrong numbers cost nothing": ("env", "", "judge", "REWARDS['wrong_number'] * len(wrong)", "0", ENV),
    "an open formula counts in part whatever its numbers": ("env", "", "judge", "(not wrong) and", "", ENV),
    "what a step claims is believed": (
        "env",
        "",
        "read_compact",
        "_result(a, op, b), formula",
        "Fraction(step[4]), formula",
        ENV,
    ),
    "numbers are not taken from what is held": ("env", "", "_take", "held.remove(at_hand)", "None", ENV),
    "the first formula counts": ("env", "", "_last", "found[max(found)]", "found[min(found)]", ENV),
    "steps may go below zero": ("env", "", "_moves", "(state[i], state[j])", "(state[j], state[i])", ENV),
    "halves are cut": ("env", "", "_moves", "b and a % b == 0", "b", ENV),
    "validation is the test": (
        "env",
        "",
        "hand_splits",
        "SPLITS.items()",
        "[*SPLITS.items(), ('test', (0.7, 0.8))]",
        ENV,
    ),
    "low hands are dealt under the other rule": (
        "env",
        "GeneralPoints",
        "_hands",
        "and (max(h) > 10) == high",
        "",
        ENV,
    ),
    "training hands are those of pretraining": (
        "env",
        "GeneralPoints",
        "_hands",
        "self.train_splits if split == 'train'",
        "('pretrain',) if split == 'train'",
        ENV,
    ),
    "hands in turn repeat": (
        "env",
        "",
        "_in_turn",
        "rng.sample(hands, len(hands))",
        "rng.choices(hands, k=len(hands))",
        ENV,
    ),
    "one face read as told is enough": ("env", "GeneralPoints", "read_as_told", "and all(", "and any(", ENV),
    "any reading is as told": ("env", "GeneralPoints", "read_as_told", "t in (None, n)", "True", ENV),
    "a wrong claim is search": ("env", "", "_step_fault", "!= claims[0]", "is None", ENV),
    "what remains may be anything": ("env", "", "_rest_fault", "Counter(stated) == held", "True", ENV),
    "intervals of six are those of many": ("report", "", "interval", "len(x) - 1) *", "10000) *", STUDENT),
    "deviations are those of all": ("report", "", "interval", "ddof=1", "ddof=0", STUDENT),
    "an interval is half as long": ("report", "", "interval", "0.5 + level / 2", "level", STUDENT),
    "one seed has an interval": ("report", "", "interval", "len(x) == 1 or", "False or", STUDENT),
    "a verdict takes the estimate": ("report", "", "verdict", "low > threshold, high", "high > threshold, low", WHOLE),
    "equivalence wants one end": ("report", "", "verdict", "-threshold < low and", "", WHOLE),
    "tests have one side": ("report", "", "p_value", "2 * stats", "stats", STUDENT),
    "the margin lies on the wrong side": (
        "report",
        "",
        "judged",
        "-margin if side == '<'",
        "margin if side == '<'",
        BELOW,
    ),
    "power is that of one test in two": ("report", "", "detectable", "stats.t.ppf(power", "stats.t.ppf(0.5", POWER),
    "Holm forgets the steps": ("report", "", "holm", "np.maximum.accumulate", "np.asarray", STUDENT),
    "Holm multiplies by one": ("report", "", "holm", "(len(p) - np.arange(len(p)))", "1", STUDENT),
    "hands are not drawn": ("report", "", "two_way", "V = seeds + hands - cells", "V = seeds", TWO_WAY),
    "cells are counted twice": ("report", "", "two_way", "V = seeds + hands - cells", "V = seeds + hands", TWO_WAY),
    "a ratio has the interval of a mean": ("report", "", "fieller", "x * y - q * V[0, 1]", "x * y", RATIO),
    "a ratio of nothing has bounds": ("report", "", "fieller", "a <= 0", "False", RATIO),
    "several bases count as seeds": (
        "report",
        "",
        "_units",
        "bases.nunique() > 1",
        "False",
        "test_report.py::test_bases_are",
    ),
    "reading takes the skill of before": ("report", "", "_reading_and_skill", "* Q +", "* mean['q0'] +", SPLIT),
    "gradients leave the set": (
        "constraint",
        "Constraint",
        "on_pre_optimizer_step",
        "allowed.part(p.grad)",
        "p.grad",
        FREE,
    ),
    "weights leave the set": ("constraint", "Constraint", "on_step_end", "allowed.nearest(p)", "p", HELD),
    "a constraint measures from where it goes on": ("constraint", "", "_start_of", "start is None", "True", GOES_ON),
    "embeddings are free under sigma": (
        "constraint",
        "",
        "_rules",
        "not (what == 'matrices' and name in matrices)",
        "name in matrices",
        HELD,
    ),
    "SFT that goes on beside RL is free": ("stages", "", "_go_on", "callbacks=held", "callbacks=()", TWIN),
    "curves begin anywhere": (
        "tradeoff",
        "",
        "curves",
        "pd.concat([evaluations, at_start]",
        "pd.concat([evaluations]",
        CURVES,
    ),
    "a level is reached at once": ("tradeoff", "", "_first_at", "above[0]", "0", EQUAL),
    "the step behind the level counts": (
        "tradeoff",
        "",
        "_first_at",
        "(level - before) / (after - before)",
        "1",
        EQUAL,
    ),
    "hands of a split depend on the rule": (
        "domains",
        "StatedTask",
        "dealt",
        "_hands(type(self), self.size)",
        "_hands(type(self), self.size - (self.rule in ('times', 'ten', 'backwards')))",
        DOMAINS,
    ),
    "training is dealt what is tested": (
        "domains",
        "StatedTask",
        "dealt",
        "else (split,)",
        "else (split, 'test')",
        DOMAINS,
    ),
    "another rule's answer is right": (
        "domains",
        "StatedTask",
        "verify",
        "came == self.right(problem)",
        "came in [self.right(replace(problem, meaning=m)) for m in self.RULES.values()]",
        DOMAINS,
    ),
    "reading is not looked at": (
        "domains",
        "StatedTask",
        "read_as_told",
        "== self.forced(problem).split()",
        "!= []",
        DOMAINS,
    ),
    "what a step of countdown claims is believed": (
        "domains",
        "Countdown",
        "result",
        "for a, op, b, _ in steps[:len(problem.items)]:",
        "value = steps[-1][3]; used = held = Counter([1])\n    for a, op, b, _ in []:",
        DOMAINS,
    ),
    "the sign may be left out": ("domains", "Countdown", "result", "used and held.total()", "held.total()", DOMAINS),
    "a number may come twice": ("domains", "Countdown", "result", "held.subtract((a, b))", "None", DOMAINS),
    "a number is left over": ("domains", "Countdown", "result", "held.total() == 1", "held.total() > 0", DOMAINS),
    "a long answer is cut anywhere": ("domains", "", "_read", "[:most].rpartition(' ')[0]", "[:most]", DOMAINS),
    "a dozen is always twelve": ("domains", "", "_counted", "n * dozen if", "n * 12 if", DOMAINS),
    "a malformed step is skipped": ("domains", "Countdown", "result", "if '=' in words", "if len(words) == 5", DOMAINS),
    "the level is the best": ("tradeoff", "", "at_equal", "start + share *", "start +", EQUAL),
}

EQUIVALENT = {}  # name: why no test can tell it from the original


def plant_everywhere(patch, module, owner, function, old, new):
    "Plants a bug, and has the modules and tests that imported the function meet it too."
    from test_ppo import plant

    place = importlib.import_module(f"gp_spectral.{module}")
    place = getattr(place, owner) if owner else place
    before = getattr(place, function)
    plant(patch, place, function, old, new)
    for other in list(sys.modules.values()):
        if getattr(other, "__dict__", {}).get(function) is before:
            patch.setattr(other, function, getattr(place, function))


def tests_fail(tests):
    "Whether a test fails, in this process; what is not found counts as an error."
    import pytest

    file, _, name = tests.partition("::")
    told = ["-q", "-x", "-n", "0", "-p", "no:cacheprovider", "--no-header", "--tb=no", "-W", "ignore"]
    found = pytest.main([*told, str(Path(__file__).parent / file), "-k", name.partition("[")[0]])
    if found not in (0, 1):
        raise SystemExit(f"{tests}: pytest ended with {found!r}")
    return found == 1


def lives(mutant):
    "Plants a mutant in a process of its own and runs its tests there."
    *bug, tests = mutant
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    import pytest

    code = 2
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        plant_everywhere(pytest.MonkeyPatch(), *bug)
        code = 1 - tests_fail(tests)
    except BaseException as e:
        print(f"{type(e).__name__}: {e}", file=sys.stderr)
    finally:
        os._exit(code)


def main(words=()):
    "Runs the mutants whose names hold one of the words, or all; the number of those that should not live."
    chosen = {k: v for k, v in MUTANTS.items() if not words or any(w in k for w in words)}
    says = {0: "dies", 1: "LIVES", 2: "could not be planted"}
    found = {}
    for name, mutant in chosen.items():
        found[name] = lives(mutant)
        print(f"{says.get(found[name], found[name]):8} {name}", flush=True)
    killed, reasons = sum(not x for x in found.values()), [k for k in found if found[k] and k in EQUIVALENT]
    print(f"{killed} of {len(found)} mutants die; {len(reasons)} are accepted as equivalent")
    for name in reasons:
        print(f"  {name}: {EQUIVALENT[name]}")
    return len(found) - killed - len(reasons)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
