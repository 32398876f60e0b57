"""What is spoiled and how it is then read to the end: a kind for each sort of file that users hand in."""

import contextlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

import mutations as m
import numpy as np
import torch

from rwkvpeft.adapters.build import build_adapter
from rwkvpeft.adapters.settings import LoraConfig
from rwkvpeft.checkpoints.adapter import Recipe, infer_recipe, load_adapter, load_recipe, save_recipe
from rwkvpeft.checkpoints.files import load_tensors, save_tensors
from rwkvpeft.checkpoints.load import load_model
from rwkvpeft.checkpoints.merge import merge_files
from rwkvpeft.checkpoints.quantised import Quantiser, model_fingerprint, quantise_file
from rwkvpeft.config.groups import DataConfig, OutputConfig
from rwkvpeft.config.layer_profile import read_layer_profile
from rwkvpeft.config.parse import build_groups, parse_train
from rwkvpeft.config.settings_file import write_settings
from rwkvpeft.data.arrays import open_numpy
from rwkvpeft.data.binidx import BinidxSource, write_binidx
from rwkvpeft.data.block import tokenise_block
from rwkvpeft.data.convert import Conversion, convert
from rwkvpeft.data.jsonl import blocks, read_records
from rwkvpeft.data.pair_source import JsonlPairs
from rwkvpeft.data.pairs import PairRows
from rwkvpeft.data.prompt_source import PromptSource
from rwkvpeft.data.prompts import read_prompts
from rwkvpeft.data.records import JsonlSource, RecordSource
from rwkvpeft.data.tables import read_table
from rwkvpeft.data.tokenizer import CharacterTokenizer, Utf8Tokenizer, VocabularyTokenizer, load_tokenizer
from rwkvpeft.data.vocabulary import read_characters
from rwkvpeft.models.rwkv7 import Rwkv7
from rwkvpeft.models.shape import new_shape
from rwkvpeft.training.resume import find_point

RECORDS = [
    {"text": "User: What is red?\n\nAssistant: A colour. \u00e9\U0001f600"},
    {
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Ho", "weight": 2},
        ]
    },
    {"conversations": [{"from": "human", "value": "two?"}, {"from": "gpt", "value": "Four.", "train": True}]},
    {"instruction": "Add", "input": "1 2", "output": "3"},
    {"prompt": "Who?", "completion": "A dog."},
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "weather"}]},
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"a": [1, {"b": null}]}'}}]},
            {"role": "tool", "content": {"t": 1.5}},
            {"role": "assistant", "content": "fine", "reasoning": "so"},
        ],
        "tools": [{"function": {"name": "f", "parameters": {"properties": {"a": {}}, "required": ["a"]}}}],
    },
]
JSONL = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS).encode()
PAIRS = "".join(json.dumps(record) + "\n" for record in (
    {"prompt": "2+2?", "chosen": "4", "rejected": "<think>a</think>5"},
    {"chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
     "rejected": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "c", "weight": 0.5}]},
    {"conversations": [{"from": "human", "value": "a"}], "chosen": {"from": "gpt", "value": "b"},
     "rejected": {"from": "gpt", "value": "c"}, "system": "s", "tools": [{"name": "f"}]},
    {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
    {"prompt": "a", "completion": "b", "label": True}, {"question": "a", "answer": "b"},
)).encode()
SETTINGS = [
    b"load_model: model.pth\ndata_file: data\npeft: lora\nmicro_bsz: 4\nlr_init: 1e-4\n"
    b"peft_config: {r: 8, lora_alpha: 16}\n",
    b"data:\n  data_file: a.jsonl:3,b.jsonl\n  ctx_len: 512\nmethod:\n  peft: lora\n  train_parts: [time, ln]\n"
    b"runtime:\n  random_seed: 1\n",
    b"base: &base\n  ctx_len: 64\ndata:\n  <<: *base\n  data_type: jsonl\n",
]
PROFILES = [
    b"Layer,Mode,Rank,Alpha,Dropout,Weight_lr_init,Weight_lr_final,Weight_decay,State_lr_init,RejectParts\n"
    b'emb,full,0,0,0,1e-5,1e-6,0,0,\n0-3,lora,16,32,0.01,1e-4,1e-5,0.01,0,"att.key,att.value"\n'
    b"4,freeze,0,0,0,0,0,0,0,\nhead,full,0,0,0,1e-5,1e-6,0,0,\n",
    b'- {layer: 0-3, mode: lora, rank: 16, state: yes}\n- {layer: "*", mode: freeze}\n'
    b"- {layer: 1, part: att.key, mode: full, reject: [w0, w1]}\n",
]
VOCABULARY = b"".join(
    b"%d %s %d\n" % (i + 1, repr(text).encode(), len(text.encode() if isinstance(text, str) else text))
    for i, text in enumerate(
        [*map(chr, range(32, 120)), "ab", "abc", "\u00e9", b"\xff", b"\xf0\x9f", "\n", "it's", 'a"']
    )
)
TABLES = {
    ".csv": b'question,answer,text\nwho,me,"a, b"\nwhat,"x\ny",c\n"it said ""no""",z,\n',
    ".json": json.dumps(
        [{"prompt": "who", "completion": "me"}, {"prompt": "what", "completion": "it"}], indent=1
    ).encode(),
}


@dataclass
class Kind:
    """``share`` of 100 inputs; ``seeds``: whole files by name; ``main``: those spoiled; ``read`` takes a folder;
    ``words`` that mean something to the reader; ``structured`` spoils a file by its parts."""

    share: int
    seeds: list[dict[str, bytes]]
    main: list[str]
    read: object
    words: list[bytes] = field(default_factory=list)
    structured: object = None


def read_pair(folder, with_mask=False):
    source = BinidxSource(folder / "data", with_mask)
    total = 0
    for document in range(len(source)):
        tokens = source.read(document)
        assert len(tokens) == source.sizes[document], "a document shorter than its size"
        total += int(tokens.astype(np.int64).sum()) if len(tokens) else 0
        if with_mask:
            spoken = source.spoken(document)
            assert len(spoken.codes if hasattr(spoken, "codes") else spoken[0]) == len(tokens)
    source.tokens(0, source.n_tokens)
    source.check(65536)


def read_masked_pair(folder):
    read_pair(folder, True)


def read_checkpoint(folder):
    path = folder / "file.pth"
    tensors = load_tensors(path)
    total = sum(
        tensor.clone().view(-1).shape[0] if tensor.is_contiguous() else tensor.contiguous().numel()
        for tensor in tensors.values()
    )
    assert total * 16 < 1 << 28, "tensors of more than their file"
    model_fingerprint(path)
    if "emb.weight" in tensors or any("nf4" in name or "int8" in name for name in tensors):
        load_model(path, op="torch")
    else:
        load_adapter(path)
        recipe = infer_recipe(tensors, str(path))
        build_adapter(recipe.method, recipe.config)
        merge_files(folder.parent / "base.pth", path, folder / "merged.pth")


def read_recipe(folder):
    recipe = load_recipe(folder / "rwkv-0.pth")
    if recipe is not None:
        recipe.to_json().encode()
        build_adapter(recipe.method, recipe.config, recipe.train_parts)
        merge_files(folder.parent / "base.pth", folder / "rwkv-0.pth", folder / "merged.pth")


def read_jsonl(folder):
    path = folder / "data.jsonl"
    for record in read_records(path, skip_bad=True):
        assert isinstance(record.value, dict)
    for start, end in blocks(path, 256):
        tokenise_block(path, start, end, "bytes", "text", with_voices=True)
    JsonlSource(path, Utf8Tokenizer())


def read_preferences(folder):
    path, refused = folder / "pairs.jsonl", []
    source = JsonlPairs(str(path), load_tokenizer("bytes"), unpaired=True, refuse=refused.append)
    rows = PairRows(source, 24, seed=0, shuffle=True, answers=3)
    for index in range(len(rows)):
        assert len(rows.row(index).input_ids) == rows.lengths[index]
    rows.report().render()
    prompts = PromptSource(str(path), read_records(path, skip_bad=True), load_tokenizer("bytes"), refuse=refused.append)
    for index in range(len(prompts)):
        prompts.read(index)


def convert_jsonl(folder):
    convert(
        Conversion(folder / "data.jsonl", folder / "out", 1, 1, "bytes", workers=1, skip_bad=True, with_mask=True),
        lambda progress: None,
    )
    read_pair_at(folder / "out")


def read_pair_at(prefix):
    source = BinidxSource(prefix, True)
    for document in range(len(source)):
        source.read(document)


def read_settings(folder):
    given = parse_train(["--config", str(folder / "config.yaml")])
    write_settings(folder / "again.yaml", build_groups(given))
    parse_train(["--config", str(folder / "again.yaml")])


def read_profile(folder):
    for path in folder.glob("profile.*"):
        rows = read_layer_profile(path)
        assert len(rows) < 1 << 20


def read_vocabulary_file(folder):
    for path in folder.glob("vocab.*"):
        if path.suffix == ".json":
            CharacterTokenizer(read_characters(path), str(path)).encode("ab")
        else:
            tokenizer = VocabularyTokenizer(path)
            tokenizer.decode(tokenizer.encode("abc ab \u00e9 " * 50))
            tokenizer.spell(np.array(tokenizer.encode("abc"), dtype=np.int32))


def read_rows(folder):
    for path in folder.glob("table.*"):
        for _ in read_table(path):
            pass
        RecordSource(str(path), read_table(path), Utf8Tokenizer())


def read_prompt_file(folder):
    for prompt in read_prompts(folder / "prompts.jsonl"):
        assert isinstance(prompt.text, str)


def read_array(folder):
    for path in folder.glob("tokens.*"):
        source = open_numpy(DataConfig(data_file=str(path)))
        for document in range(min(len(source), 100)):
            source.read(document)
        source.check(65536)


def read_points(folder):
    point = find_point(OutputConfig(proj_dir=str(folder), resume="auto"), lambda line: None)
    if point is not None:
        for tensor in point.tensors().values():
            tensor.clone()


def read_folder(folder):
    load_adapter(folder)


def kinds(base):
    """All kinds by name; ``base`` is an empty folder, in which the base model of adapters is put."""
    torch.manual_seed(0)
    made = base / "made"
    made.mkdir()
    shape = new_shape("x070", n_layer=2, n_embd=32, vocab_size=64, head_size=16)
    weights = Rwkv7.initial_weights(shape)
    save_tensors(base / "base.pth", weights)
    lora = {
        f"blocks.{i}.att.key.{part}": torch.randn(sizes)
        for i in range(2)
        for part, sizes in (("lora_A", (4, 32)), ("lora_B", (32, 4)))
    }
    states = {f"blocks.{i}.att.time_state": torch.randn(2, 16, 16) for i in range(2)}
    recipe = Recipe(
        "lora",
        asdict(LoraConfig(r=4, lora_alpha=8)),
        base_model="base.pth",
        shape={"n_layer": 2},
        loss=1.5,
        tokenizer="bytes",
        ctx_len=8,
    )
    torch.save({"state_dict": lora, "epoch": 3, "lr": [1e-3, None]}, made / "nested.pth")
    torch.save(lora, made / "old.pth", _use_new_zipfile_serialization=False)
    torch.save({**weights, "w": weights["emb.weight"].to(torch.float8_e4m3fn)}, made / "eight.pth")
    save_tensors(made / "lora.pth", lora)
    save_tensors(made / "state.pth", states)
    quantise_file(base / "base.pth", made / "int8.pth", Quantiser("int8"))
    save_recipe(made / "rwkv-0.pth", recipe)
    for kind, dtype in enumerate((np.uint16, np.int32, np.uint8)):
        write_binidx(made / f"data{kind}", [np.arange(n % 50, dtype=dtype) for n in range(1, 9 + kind)], dtype)
    (made / "data.jsonl").write_bytes(JSONL)
    convert(
        Conversion(made / "data.jsonl", made / "masked", 1, 1, "bytes", workers=1, with_mask=True),
        lambda progress: None,
    )
    for name, arrays in (
        ("a.npy", np.arange(50, dtype=np.uint16)),
        ("b.npy", np.arange(40, dtype=">i4").reshape(4, 10)),
    ):
        np.save(made / name, arrays)
    np.savez(made / "c.npz", np.arange(50))
    np.savez_compressed(made / "d.npz", np.arange(500) % 7)
    with contextlib.suppress(ImportError):
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"prompt": ["a", "b"], "completion": ["c", None]}), made / "t.parquet")
        TABLES[".parquet"] = (made / "t.parquet").read_bytes()

    def of(name):
        return (made / name).read_bytes()

    pairs = [{"data.idx": of(f"data{kind}.idx"), "data.bin": of(f"data{kind}.bin")} for kind in range(3)]
    masked = {f"data.{end}": of(f"masked.{end}") for end in ("idx", "bin", "mask")}
    checkpoints = [
        {"file.pth": of(name)} for name in ("lora.pth", "state.pth", "nested.pth", "old.pth", "eight.pth", "int8.pth")
    ]
    checkpoints.append({"file.pth": (base / "base.pth").read_bytes()})
    point = {
        "resume/step-00000003/tensors.pth": of("lora.pth"),
        "resume/step-00000003/resume.json": json.dumps(
            {
                "format": 1,
                "progress": {"step": 3},
                "essentials": {"random_seed": 1},
                "tensors_bytes": len(of("lora.pth")),
            }
        ).encode(),
    }
    found = {
        "idx": Kind(22, pairs, ["data.idx"], read_pair, structured=m.spoiled_index),
        "bin": Kind(8, pairs, ["data.bin"], read_pair),
        "mask": Kind(6, [masked], ["data.mask", "data.idx"], read_masked_pair, m.JSON_WORDS),
        "pth": Kind(20, checkpoints, ["file.pth"], read_checkpoint, structured=m.spoiled_archive),
        "recipe": Kind(
            3,
            [{"rwkv-0.pth": of("lora.pth"), "rwkv-0.json": of("rwkv-0.json")}],
            ["rwkv-0.json"],
            read_recipe,
            m.JSON_WORDS,
        ),
        "jsonl": Kind(16, [{"data.jsonl": JSONL}], ["data.jsonl"], read_jsonl, m.JSON_WORDS),
        "pairs": Kind(4, [{"pairs.jsonl": PAIRS}], ["pairs.jsonl"], read_preferences, m.JSON_WORDS),
        "convert": Kind(3, [{"data.jsonl": JSONL}], ["data.jsonl"], convert_jsonl, m.JSON_WORDS),
        "yaml": Kind(8, [{"config.yaml": text} for text in SETTINGS], ["config.yaml"], read_settings, m.YAML_WORDS),
        "profile": Kind(
            4,
            [{"profile.csv": PROFILES[0]}, {"profile.yaml": PROFILES[1]}],
            ["profile.csv", "profile.yaml"],
            read_profile,
            m.YAML_WORDS + m.TABLE_WORDS,
        ),
        "vocab": Kind(
            3,
            [{"vocab.txt": VOCABULARY}, {"vocab.json": b'{"0": "a", "1": "b"}'}],
            ["vocab.txt", "vocab.json"],
            read_vocabulary_file,
            m.VOCABULARY_WORDS,
        ),
        "table": Kind(
            3,
            [{f"table{end}": text} for end, text in TABLES.items()],
            [f"table{end}" for end in TABLES],
            read_rows,
            m.TABLE_WORDS,
        ),
        "array": Kind(
            2,
            [{f"tokens{Path(name).suffix}": of(name)} for name in ("a.npy", "b.npy", "c.npz", "d.npz")],
            ["tokens.npy", "tokens.npz"],
            read_array,
        ),
        "prompts": Kind(
            1,
            [{"prompts.jsonl": JSONL + b'"Hi"\n{"prompt": "Ho"}\n'}],
            ["prompts.jsonl"],
            read_prompt_file,
            m.JSON_WORDS,
        ),
        "resume": Kind(1, [point], list(point), read_points, m.JSON_WORDS),
    }
    with contextlib.suppress(ImportError):
        from rwkvpeft.checkpoints.huggingface import write_folder

        write_folder(made / "peft", lora, recipe)
        folder = {path.name: path.read_bytes() for path in (made / "peft").iterdir()}
        found["peft"] = Kind(2, [folder], list(folder), read_folder, m.JSON_WORDS)
    return found


def spoil(kind, random):
    """The files of one spoiled input, by name."""
    seed = random.choice(kind.seeds)
    name = random.choice([name for name in kind.main if name in seed])
    others = [content for files in kind.seeds for content in files.values()]
    if kind.structured is not None and random.random() < 0.5:
        changed = kind.structured(random, seed[name], others)
    else:
        changed = m.spoiled(random, seed[name], others, kind.words)
    return {**seed, name: changed}


def put(files, folder):
    """Write files into an emptied folder."""
    for root, _, names in os.walk(folder):
        for name in names:
            os.unlink(os.path.join(root, name))
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
