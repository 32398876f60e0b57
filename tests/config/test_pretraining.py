import pytest

from rwkvpeft.config.parse import parse_train
from rwkvpeft.config.resolve import Machine, resolve
from rwkvpeft.errors import UserError

NEW = "--my_testing x070 --n_layer 2 --n_embd 64 --data_file d --random_seed 1 --ctx_len 512 --micro_bsz 16"


def resolved(words):
    return resolve(parse_train(f"{NEW} {words}".split()), Machine("cpu", has_bf16=False))[0]


def test_a_stage_has_mini_epochs_of_40320_rows_in_rwkv_lms_order():
    config = resolved("--train_stage 3 --magic_prime 2926181 --my_exit_tokens 1498226207 --devices 2")
    assert config.data.dataload == "get"
    assert config.schedule.epoch_steps == 40320 // 32
    # 72.6 mini-epochs of 40320 * 512 tokens
    assert config.schedule.epoch_count == 73


def test_a_stage_without_an_end_takes_one_pass_at_the_exponential_rate():
    config = resolved("--my_pile_stage 2 --magic_prime 2926181")
    assert (config.schedule.train_stage, config.schedule.epoch_count) == (2, 2926181 // 40320)
    assert config.schedule.lr_schedule == "exp"
    assert resolved("--train_stage 2 --magic_prime 2926181 --lr_final 0").schedule.lr_schedule == "linear"


@pytest.mark.parametrize(("words", "epochs"), [("--epoch_count 999999", 73), ("--epoch_count 5", 5)])
def test_a_given_number_of_mini_epochs_is_a_limit_that_need_not_be_reached(words, epochs):
    config = resolved(f"--train_stage 3 --magic_prime 2926181 --my_exit_tokens 1498226207 {words}")
    assert config.schedule.epoch_count == epochs


def test_tokens_tell_the_mini_epochs_of_any_run():
    assert resolved("--epoch_steps 10 --my_exit_tokens 81921").schedule.epoch_count == 2
    assert resolved("--epoch_steps 10 --my_exit_tokens -81921").schedule.epoch_count == 2
    # those before epoch_begin are counted, as RWKV-LM does
    assert resolved("--epoch_steps 10 --my_exit_tokens 400000 --epoch_begin 3").schedule.epoch_count == 2
    assert resolved("--epoch_steps 10").schedule.epoch_count == 500


def test_0_means_no_model_as_in_rwkv_lms_scripts():
    assert resolved("--load_model 0").model.load_model == ""


def test_stage_1_with_a_model_grows_it():
    assert resolved("--train_stage 1 --load_model small.pth").model.load_partial == 1
    with pytest.raises(UserError, match="no effect with --load_partial 0"):
        resolved("--train_stage 1 --load_model small.pth --load_partial 0")


def test_several_machines_begin_with_weights_drawn_by_one():
    with pytest.raises(UserError, match="cannot draw the same initial weights"):
        resolved("--num_nodes 2")
    assert resolved("--train_stage 3 --magic_prime 5 --num_nodes 2").runtime.num_nodes == 2


def test_a_stage_does_not_train_an_adapter():
    with pytest.raises(UserError, match="--train_stage 3 needs all its weights trained"):
        resolved("--train_stage 3 --magic_prime 5 --peft lora")
