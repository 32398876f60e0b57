import ast
from pathlib import Path

import pytest

import rwkvpeft
from rwkvpeft.config import upstream
from rwkvpeft.config.flags import specs
from rwkvpeft.config.parse import group_types
from rwkvpeft.registry import ADAPTERS, find

PACKAGE = Path(rwkvpeft.__file__).parent
FIELDS = [(group, spec) for group, kind in group_types().items() for spec in specs(kind)]


def names_read_outside_config():
    read = set()
    for path in PACKAGE.rglob("*.py"):
        if "config" in path.relative_to(PACKAGE).parts[:1]:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read.add(node.attr)
    return read


READ = names_read_outside_config()
# compared with the checkpoint's sizes in a loop over their names
READ_BY_NAME = {"my_testing", "n_layer", "n_embd", "vocab_size", "dim_att", "dim_ffn", "head_size_a"}


@pytest.mark.parametrize(("group", "spec"), FIELDS, ids=lambda item: getattr(item, "name", item))
def test_every_flag_is_read_somewhere(group, spec):
    assert spec.name in READ | READ_BY_NAME


@pytest.mark.parametrize(("group", "spec"), FIELDS, ids=lambda item: getattr(item, "name", item))
def test_every_flag_has_help(group, spec):
    assert len(spec.help) > 8
    assert not spec.help.endswith(".")


def test_no_two_flags_share_a_name():
    names = [name for _, spec in FIELDS for name in (spec.name, spec.alias) if name] + list(upstream.FLAGS)
    assert len(names) == len(set(names))


@pytest.mark.parametrize("method", ADAPTERS)
def test_every_setting_of_a_method_has_help(method):
    settings = find(ADAPTERS, method, flag="--peft").Config
    assert all(len(spec.help) > 8 for spec in specs(settings))
    assert len(specs(settings)) == len(settings.__dataclass_fields__)


def test_every_flag_of_upstream_is_known():
    ours = {name for _, spec in FIELDS for name in (spec.name, spec.alias) if name}
    missing = sorted(set(UPSTREAM.split()) - ours - set(upstream.FLAGS))
    assert not missing


# RWKV-PEFT's train.py of January 2026, RWKV-LM's of RWKV-v5 and RWKV-v7/train_temp of August 2026, and the flags of
# Lightning that RWKV-LM's scripts pass
UPSTREAM = """
    load_model wandb proj_dir random_seed data_file data_type vocab_size ctx_len epoch_steps epoch_count epoch_begin
    epoch_save micro_bsz n_layer n_embd dim_att dim_ffn pre_ffn head_qk tiny_att_dim tiny_att_layer lr_init lr_final
    warmup_steps beta1 beta2 adam_eps grad_cp dropout weight_decay weight_decay_final my_pile_version my_pile_stage
    my_pile_shift my_pile_edecay layerwise_lr ds_bucket_mb my_sample_len my_ffn_shift my_att_shift head_size_a
    head_size_divisor my_pos_emb load_partial magic_prime my_qa_mask my_random_steps my_testing my_exit my_exit_tokens
    peft train_parts lora_config peft_config pissa_config miss_config merge quant dataload chunk_ctx fla train_type
    loss_mask mask_id data_shuffle optimizer avg_loss sft_field sft_split op fused_kernel lr_schedule accelerator
    strategy devices num_nodes precision accumulate_grad_batches num_workers persistent_workers prefetch_factor
    grad_clip train_stage head_size head_chunk kernel enable_progress_bar
    lisa_config bone_config disha_config optim rwkv_version
"""
