"""Reading layer profiles."""

from __future__ import annotations

from pathlib import Path

import pytest

from rwkvpeft.config.layer_profile import (
    LINEAR_MODES,
    LayerRow,
    layer_ranges,
    read_layer_profile,
    rows_from_plain,
    to_plain,
    with_states,
)
from rwkvpeft.errors import UserError

# the columns and habits of RWKV-LM-RLHF's main/layerprofile: every cell filled, spreadsheet numbers, quoted lists
UPSTREAM = """\
Layer,Mode,Rank,Alpha,Dropout,Weight_lr_init,Weight_lr_final,Weight_decay,State_lr_init,State_lr_final,RejectParts
emb,freeze,0,0,0.01,1.00E-06,1.00E-07,0.001,0.05,0.01,
0,bone,512,32,0.01,2.00E-05,1.00E-06,0.001,0.05,0.01,"att.receptance,att.key, ffn.x_k"
1,lora,16,32,0.01,0.00001,0.000001,0,0.05,0.01,
2,full,16,32,0.01,3.00E-05,1.00E-05,0,0.05,0.01,
head,freeze,256,32,0.01,2.00E-05,1.00E-06,0.001,0.05,0.01,
"""


@pytest.fixture
def read(tmp_path):
    def write_and_read(text, name="profile.csv"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return read_layer_profile(path)

    return write_and_read


def test_a_file_with_upstreams_columns_is_understood(read):
    rows = {row.layer: row for row in read(UPSTREAM)}
    assert list(rows) == ["emb", "0", "1", "2", "head"]
    assert rows["0"] == LayerRow(
        "0", "bone", rank=512, alpha=32, dropout=0.01, lr_init=2e-5, lr_final=1e-6, weight_decay=0.001,
        state_lr_init=0.05, state_lr_final=0.01, reject=("att.receptance", "att.key", "ffn.x_k"),
    )
    assert (rows["2"].mode, rows["2"].lr_init) == ("full", 3e-5)


def test_our_own_names_mean_the_same_in_csv_and_yaml(read):
    from_csv = read(
        "layer,part,Method,R,lr_init,reject,state\n"
        '0-1,att,LoRA,4,1e-4,"att.key,att.value",\n'
        "default,,state,,,,\n"
    )
    from_yaml = read(
        "- {layer: 0-1, part: att, method: LoRA, r: 4, lr_init: 1e-4, reject: [att.key, att.value]}\n"
        "- layer: default\n  mode: state\n",
        "profile.yaml",
    )
    assert from_yaml == from_csv
    assert from_csv[0] == LayerRow("0", "lora", part="att", rank=4, lr_init=1e-4, reject=("att.key", "att.value"))


def test_a_range_and_default_stand_for_their_layers(read):
    rows = read("layer,mode\n0 - 2,freeze\n*,full\n")
    assert [row.layer for row in rows] == ["0", "1", "2", "*"]


def test_blank_lines_comments_and_a_byte_order_mark_are_passed_over(read):
    assert read("\ufefflayer,mode\n\n# the rest\n,\n0,full\n") == [LayerRow("0", "full")]


@pytest.mark.parametrize("mode", LINEAR_MODES)
def test_a_mode_with_an_adapter_needs_a_rank(read, mode):
    assert read(f"layer,mode,rank\n0,{mode},8\n")[0].rank == 8
    with pytest.raises(UserError, match=rf"csv:2: mode {mode} needs a rank"):
        read(f"layer,mode,rank\n0,{mode},0\n")


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("0,lorra,4,", "the mode is unknown"),
        ("0,,4,", "the mode is unknown"),
        ("nought,full,,", "the layer is none"),
        ("3-1,full,,", "the layer is none"),
        ("0,lora,four,", "rank is not a number"),
        ("0,lora,4.5,", "needs a rank"),
        ("0,lora,4,-1", "lr_init is not a number from 0"),
        ("0,full,,nan", "lr_init is not a number from 0"),
        ("0,full,,1e-4,att.key", "more cells than there are columns"),
        ("emb,lora,4,", "the embedding is trained in full or not at all"),
        ("head,state,,", "the initial memory belongs to a whole layer"),
    ],
)
def test_a_mistake_is_told_with_its_line(read, line, complaint):
    with pytest.raises(UserError, match=rf"csv:3: .*{complaint}|csv:3 .*{complaint}"):
        read(f"layer,mode,rank,lr_init\ndefault,freeze,,\n{line}\n")


@pytest.mark.parametrize(
    ("cells", "complaint"),
    [
        ("part: attention, mode: full", "the part is unknown"),
        ("part: att, mode: state", "the initial memory belongs to a whole layer"),
        ("part: att, mode: full, state: yes", "the initial memory belongs to a whole layer"),
        ("mode: full, state: perhaps", "neither yes nor no"),
        ("mode: lora, rank: 4, alpha: 0", "alpha must be above 0"),
        ("mode: lora, rank: 4, dropout: 1", "dropout is out of range"),
        ("mode: full, method: lora", "given twice"),
    ],
)
def test_a_mistake_in_yaml_is_told_with_its_line_too(read, cells, complaint):
    with pytest.raises(UserError, match=rf"yaml:2: .*{complaint}"):
        read(f"- {{layer: default, mode: freeze}}\n- {{layer: 0, {cells}}}\n", "profile.yaml")


def test_every_mistake_of_a_file_stands_in_one_message(read):
    with pytest.raises(UserError) as told:
        read("layer,mode,rnk\n0,lora,4\n0,full,\n4,frozen,\n")
    for words in ("unknown column", "'rnk'", "csv:2: mode lora needs a rank", "csv:3 names layer 0 again",
                  "csv:4: the mode is unknown", "no row for 1-3"):
        assert words in str(told.value)


@pytest.mark.parametrize("text", ["", "layer,mode\n"])
def test_an_empty_file_is_refused(read, text):
    with pytest.raises(UserError, match="holds no row"):
        read(text)


@pytest.mark.parametrize("text", ["layer: 0\n", "", "- 3\n", "- {layer: *, mode: full}\n"])
def test_yaml_that_is_no_list_of_rows_is_refused(read, text):
    with pytest.raises(UserError, match="profile.yaml"):
        read(text, "profile.yaml")


def test_a_missing_file_is_a_plain_message(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_layer_profile(tmp_path / "none.csv")


def test_rows_survive_being_written_and_read(read):
    rows = read(UPSTREAM)
    assert rows_from_plain(to_plain(rows)) == rows


def test_equal_neighbours_are_written_as_one_row(read):
    rows = read("layer,mode,rank\nemb,freeze,\n0-3,lora,8\n4,full,\n5-6,lora,8\n")
    assert [row["layer"] for row in to_plain(rows)] == ["emb", "0-3", "4", "5-6"]
    assert rows_from_plain(to_plain(rows)) == rows


def test_states_are_added_to_every_numbered_layer(read):
    rows = with_states(read("layer,part,mode\nemb,,full\n0,,freeze\n1,att,full\nhead,,freeze\n"))
    assert {row.layer for row in rows if row.trains_state} == {"0", "1"}
    assert [row.mode for row in rows if row.layer == "1"] == ["full", "state"]


def test_layer_numbers_are_shown_as_ranges():
    assert layer_ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "scripts" / "profiles").iterdir()), ids=str)
def test_the_shipped_examples_can_be_read(path):
    assert read_layer_profile(path)
