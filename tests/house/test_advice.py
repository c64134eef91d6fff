"""Every message that tells a user what to type is listed here, with the test that follows it."""

from __future__ import annotations

import re

import pytest

from tests.support.advice_lint import ROOT, messages

pytestmark = pytest.mark.unit

OWN = "checkpoint/test_advice.py::test_own_options_take_the_steps_of_the_run"
MODEL = "checkpoint/test_facts.py::test_all_differences_are_named_at_once_and_the_advice_works"
POSITION = "checkpoint/test_advice.py::test_weights_without_a_position_are_taken_alone"
INPUT = "launcher/test_advice.py::test_missing_program_inputs_are_given_as_advised"
SLURM = "slurm/test_allocation.py::test_advice_on_keys_decided_by_slurm_works"
ADVICE_TESTS = {
    # a part of the message: the test that follows it
    "leave it out, or add --load FOLDER --from_scratch false": (
        "neox_arguments/test_advice.py::test_options_named_by_a_rule_can_be_typed"
    ),
    "nothing is logged there without pip install wandb": "launcher/test_advice.py::test_a_library_that_is_missing",
    "expected `key: value` lines": "launcher/test_advice.py::test_a_file_holds_keys_with_their_values",
    "expected `--key value` here": "launcher/test_advice.py::test_files_come_before_the_first_option",
    "`kernels` chooses fused operations": "launcher/test_advice.py::test_kernels_replaces_the_fusion_keys",
    "--dry-run --search ranks the layouts": "launcher/test_advice.py::test_layouts_are_ranked_by_a_search",
    "`enabled` turns it on": "launcher/test_advice.py::test_enabled_says_the_precision",
    "--nodelist and --exclude": SLURM,
    "the job gets them from sbatch or salloc": SLURM,
    "itself starts all nodes with srun": SLURM,
    "to go back to one of its own: {} --iteration N": OWN,
    "of its own checkpoints in {}, as `iteration` says": "checkpoint/test_choice.py::test_what_a_run_begins_from",
    "--load {}": OWN,
    "--save {}": "trainer/test_lora_runs.py::test_going_back_and_what_the_message_advises",
    "holds an adapter and no model": ("trainer/test_lora_runs.py::test_an_adapter_is_evaluated_only_with_its_base"),
    "--from_scratch false": OWN,
    "--finetune false": OWN,
    "(choose one with {} --iteration {})": (
        "trainer/test_command_line_faults.py::test_going_back_and_what_the_message_advises"
    ),
    "give the folder that holds `latest` and `global_stepN`": (
        "checkpoint/test_discovery.py::test_a_wrong_path_is_an_error_that_says_what_there_is"
    ),
    "`iteration` asks for it": "checkpoint/test_discovery.py::test_a_wrong_path_is_an_error_that_says_what_there_is",
    "--allow_model_changes [{}]": MODEL,
    "python tools/convert_hf to-neox": "launcher/test_boundary.py::test_a_foreign_folder_is_recognized",
    "python tools/convert_hf reshard": "launcher/test_boundary.py::test_a_foreign_folder_is_recognized",
    "the folder above them with `latest`": "launcher/test_boundary.py::test_a_foreign_folder_is_recognized",
    "`python tools/convert_hf reshard --tp {}`": "checkpoint/test_advice.py::test_the_other_tensor_parallel_size",
    "--no_load_optim true": "checkpoint/test_advice.py::test_ways_out_of_an_unfit_optimizer",
    " --finetune true": "checkpoint/test_advice.py::test_ways_out_of_an_unfit_optimizer",
    "`load` is not set": "checkpoint/test_advice.py::test_weights_are_loaded_from_a_folder_that_is_given",
    "go back to an earlier one with --iteration N": "checkpoint/test_advice.py::test_an_earlier_step_is_taken_instead",
    "Go back to an earlier checkpoint with --iteration N": (
        "checkpoint/test_advice.py::test_an_earlier_step_is_taken_instead"
    ),
    "wait until it ends, or give another folder with --save NEW": (
        "checkpoint/test_advice.py::test_another_folder_or_a_removed_claim"
    ),
    "continue the run in another folder with --save": (
        "checkpoint/test_advice.py::test_another_folder_or_a_removed_claim"
    ),
    "start from its weights with `finetune: true`": POSITION,
    "start from the weights with `finetune: true`": POSITION,
    "--dry-run plans a training": "launcher/test_advice.py::test_a_dry_run_is_of_a_training",
    "(--paths-on-nodes)": "planner/test_dry_run.py::test_the_commands_of_the_guide",
    "--paths-on-nodes leaves this check": "launch/test_render.py::test_missing_inputs_are_reported_before_queueing",
    "or give --num_nodes {}": "slurm/test_allocation.py::test_an_allocation_of_another_size_is_refused",
    "srun is not on PATH": "launcher/test_advice.py::test_deepy_is_called_where_srun_is",
    "Raise it with --train_iters N": "trainer/test_schedule.py::test_a_run_shorter_than_its_checkpoint",
    "--allow-high-initial-loss true": "trainer/test_runs.py::test_a_continued_run_that_knows_nothing_stops",
    "unset RANK, WORLD_SIZE and LOCAL_RANK": "launcher/test_advice.py::test_variables_of_another_launcher_are_unset",
    "start the ranks by srun": "launcher/test_advice.py::test_a_step_keeps_the_variables_of_slurm",
    "export MASTER_ADDR": "launcher/test_advice.py::test_an_address_is_exported",
    "python deepy.py {} model.yml run.yml": "launcher/test_advice.py::test_files_are_given_to_deepy",
    "start it by python deepy.py, srun or to": "launcher/test_launcher.py::test_ranks_know_their_place",
    "submit it by: sbatch": "slurm/test_guide.py::test_commands_of_the_guide",
    "or other sizes after `--`": "launch/test_render.py::test_impossible_jobs_are_rejected",
    "give --account": "launch/test_render.py::test_the_longest_time_is_the_default",
    "--signal-seconds {}": "launch/test_render.py::test_impossible_jobs_are_rejected",
    "sbatch reads it from one line": "launch/test_render.py::test_impossible_jobs_are_rejected",
    "--env {}: expected NAME=VALUE": "launch/test_render.py::test_a_script_with_secrets_is_its_owners_alone",
    "--time {}: expected HOURS": "launch/test_render.py::test_impossible_jobs_are_rejected",
    "give --time HOURS:MINUTES:SECONDS": "launch/test_render.py::test_missing_inputs_are_reported_before_queueing",
    "eval_tasks needs lm-eval": "launcher/test_advice.py::test_a_library_that_is_missing",
    "the file of questions (--mcq.items FILE)": INPUT,
    "the file of texts (--embed.input FILE)": INPUT,
    "the prefix of the images to continue (--completion.path PREFIX)": INPUT,
    "it is requeued at its limit": "launch/test_render.py::test_time_limits_of_frontier",
}
# Text that is not advice: parts of scripts, usage, patterns of warnings.
NOT_ADVICE = (
    "usage: python deepy.py", "ignore:", "#SBATCH", "# Every group", "# after the loss", "export CUDA_",
    "export PYTHON", "export DS_", "export OMP_", "--dry-run --machine", "--print-config", "--no-screen",
    "--exclude-file", "--bind",
)  # fmt: skip


def test_every_message_that_advises_has_a_test() -> None:
    unknown = [
        f"{file}:{line}: {text}"
        for file, line, text in messages()
        if not any(part in text for part in (*ADVICE_TESTS, *NOT_ADVICE))
    ]
    assert not unknown, "messages that advise and are not in ADVICE_TESTS:\n" + "\n".join(unknown)


def test_no_entry_is_left_over() -> None:
    texts = [text for _, _, text in messages()]
    assert [part for part in ADVICE_TESTS if not any(part in text for text in texts)] == []


@pytest.mark.parametrize("name", sorted(set(ADVICE_TESTS.values())))
def test_the_tests_exist(name: str) -> None:
    file, _, function = name.partition("::")
    assert function, f"{name}: name the test that follows the advice, not its file"
    assert re.search(rf"^def {function}\(", (ROOT / "tests" / file).read_text(), re.MULTILINE)
