"""CLIP's byte pairs as open_clip has them, sentence pieces, and the choice between tokenizers."""

import json
import logging
import random
from pathlib import Path

import pytest
import sentencepiece
import torch

from optima_fast.errors import UserError
from optima_fast.tasks import tokenizers
from optima_fast.tasks.subwords import ClipBytePairs, SentencePieces
from optima_fast.tasks.text import Vocabulary

RECORDED = json.loads(Path(__file__).with_name("clip_tokens.json").read_text())
_DRAW = random.Random(0)
_WORDS = [
    "".join(_DRAW.choices(["ba", "ki", "Lo", "ter", "ing", "un", "'s"], k=k)) for k in [2, 3] * 30
]
THREADS = Path("/proc/self/task")
CORPUS = [f"Is the {' '.join(_DRAW.choices(_WORDS, k=5))}?" for _ in range(300)]


def again(tokenizer):
    return tokenizers.from_dict(json.loads(json.dumps(tokenizer.to_dict())))


@pytest.fixture(scope="module")
def clip():
    return ClipBytePairs()


@pytest.fixture(scope="module")
def pieces():
    return SentencePieces.train(CORPUS, max_size=100)


def spm(tmp_path, **ids):
    """The file of a small model with the given special ids."""
    path = tmp_path / "own.model"
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS),
            model_writer=file,
            vocab_size=60,
            hard_vocab_limit=False,
            minloglevel=2,
            **ids,
        )
    return path


@pytest.mark.parametrize("row", RECORDED, ids=lambda row: ascii(row["text"])[:30])
def test_clip_ids_are_those_of_open_clip(clip, row):
    assert clip.encode(row["text"], 76) == row["ids"]
    assert clip.length(row["text"]) == row["length"]
    decoded = row["decoded"].replace("<start_of_text>", "").strip()
    assert clip.decode(row["ids"]) == decoded


def test_clip_has_the_ids_of_the_checkpoints(clip):
    assert (len(clip), clip.pad_id, clip.bos_id, clip.eos_id) == (49408, 0, 49406, 49407)
    assert again(clip) == clip
    assert clip != Vocabulary([])


def test_clip_decoding_keeps_exclamation_marks_inside_and_drops_padding(clip):
    inside = clip.pieces("!?!?")
    assert clip.decode([49406, 0, 0, 256, 320, 49407, 0, 0]) == "!!! a"
    assert clip.decode(torch.tensor([49406, 320, 0, 0])) == "a"
    assert clip.decode([*inside, 49407, 320]) == "!?!?"
    assert clip.decode([]) == ""
    assert clip.decode([100]) == "\ufffd"
    for wrong in (-1, 49408):
        with pytest.raises(ValueError, match=rf"ids must be in 0 \.\. 49407, got {wrong}"):
            clip.decode([wrong])


@pytest.mark.skipif(not THREADS.exists(), reason="reads Linux's /proc")
def test_clip_starts_no_threads_that_a_fork_would_lose(clip):
    before = set(THREADS.iterdir())
    clip.encode_all([f"text {i}" for i in range(300)], 8)
    assert set(THREADS.iterdir()) <= before


def test_sentence_pieces_undo_themselves_in_lower_case(pieces):
    assert (pieces.pad_id, pieces.bos_id, pieces.eos_id) == (0, 1, 2)
    assert 60 < len(pieces) <= 100
    for text in CORPUS:
        row = pieces.encode(text, 60)
        assert row[0] == 1
        assert row[pieces.length(text) - 1 :] == [2] + [0] * (60 - pieces.length(text))
        assert pieces.decode(row) == text.lower()
    assert pieces.pieces("is THE bating's") == pieces.pieces("Is the  BATING'S")
    assert 3 in pieces.encode("\u4e2d", 5)
    assert pieces.encode("lone \ud800", 9) == pieces.encode("lone ?", 9)


def test_sentence_pieces_are_trained_the_same_each_time(pieces):
    assert SentencePieces.train(CORPUS, max_size=100) == pieces
    assert SentencePieces.train(CORPUS, max_size=55) != pieces
    assert SentencePieces.train(CORPUS[::2], max_size=100) != pieces


def test_sentence_pieces_survive_json(pieces):
    back = again(pieces)
    assert back == pieces
    assert hash(back) == hash(pieces)
    assert back.encode(CORPUS[0], 60) == pieces.encode(CORPUS[0], 60)
    for state in ({}, {"model": 3}, {"model": "?"}, {"model": ""}, {"model": "AAAA"}):
        with pytest.raises(UserError, match="a saved sentence-piece model is damaged"):
            tokenizers.from_dict({"kind": "sentencepiece", **state})


def test_sentence_pieces_need_texts_and_room_for_their_characters():
    with pytest.raises(UserError, match="no sentence pieces from the training texts: they hold no"):
        SentencePieces.train(["", " "])
    with pytest.raises(UserError, match="smaller than required_chars. 8 vs"):
        SentencePieces.train(CORPUS, max_size=8)


def test_a_model_without_padding_gets_it_before_its_own_ids(tmp_path):
    path = spm(tmp_path)  # the trainer's own ids: unknown 0, begin 1, end 2, no padding
    own = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokenizer = tokenizers.make(str(path), [])
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 2, 3)
    assert len(tokenizer) == own.get_piece_size() + 1
    row = tokenizer.encode(CORPUS[4], 60)
    assert row[1 : tokenizer.length(CORPUS[4]) - 1] == [i + 1 for i in own.encode(CORPUS[4])]
    assert tokenizer.decode(row) == CORPUS[4]
    assert tokenizer.decode([2, len(tokenizer) - 1, 3]) == own.decode([len(tokenizer) - 2])
    with pytest.raises(ValueError, match="ids must be in"):
        tokenizer.decode([len(tokenizer)])
    assert again(tokenizer) == tokenizer


def test_a_model_with_padding_at_0_keeps_its_ids(tmp_path):
    path = spm(tmp_path, pad_id=0, eos_id=1, unk_id=2, bos_id=3)
    own = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokenizer = tokenizers.make(str(path), [])
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 3, 1)
    assert tokenizer.pieces(CORPUS[0]) == own.encode(CORPUS[0])
    assert len(tokenizer) == own.get_piece_size()


@pytest.mark.parametrize(
    "ids", [{"pad_id": 3}, {"pad_id": 0, "unk_id": 3, "bos_id": -1}, {"eos_id": -1}]
)
def test_a_model_with_other_special_ids_is_refused(tmp_path, ids):
    with pytest.raises(UserError, match=r"own\.model: .* must have its padding at id 0, or none"):
        tokenizers.make(str(spm(tmp_path, **ids)), [])


def test_files_that_are_no_model(tmp_path):
    (tmp_path / "junk.model").write_bytes(b"<html>not found</html>")
    (tmp_path / "empty.model").write_bytes(b"")
    for name in ("junk", "empty"):
        with pytest.raises(UserError, match=rf"tokenizer .*{name}\.model: no sentence-piece model"):
            tokenizers.make(str(tmp_path / f"{name}.model"), [])
    with pytest.raises(UserError, match=r"cannot read the tokenizer .*absent\.model: No such file"):
        tokenizers.make(str(tmp_path / "absent.model"), [])


@pytest.mark.parametrize("tokenizer", ["clip", "pieces"])
def test_a_table_of_texts_is_their_rows(tokenizer, request):
    tokenizer = request.getfixturevalue(tokenizer)
    texts = [*CORPUS[:3], "", CORPUS[0], CORPUS[0] * 9]
    table = tokenizer.encode_all(texts, 12)
    assert table.dtype == torch.int64
    assert table.tolist() == [tokenizer.encode(text, 12) for text in texts]
    assert tokenizer.encode_all([], 12).shape == (0, 12)
    long = tokenizer.pieces(texts[-1])
    assert table[-1].tolist() == [tokenizer.bos_id, *long[:10], tokenizer.eos_id]
    with pytest.raises(ValueError, match=r"length must be at least 3 .*, got 2"):
        tokenizer.encode_all(texts, 2)


def test_make_by_name():
    assert tokenizers.make("words", CORPUS) == Vocabulary.build(CORPUS)
    assert tokenizers.make("clip", CORPUS) == ClipBytePairs()
    trained = tokenizers.make("sentencepiece", CORPUS, max_size=55)
    assert trained == SentencePieces.train(CORPUS, max_size=55)
    assert len(tokenizers.make("sentencepiece", CORPUS)) > 60
    with pytest.raises(UserError, match="tokenizer must be words, clip, .* got 'bpe'"):
        tokenizers.make("bpe", CORPUS)
    with pytest.raises(UserError, match="tokenizer clip has no max_size, got 99: leave it out"):
        tokenizers.make("clip", CORPUS, max_size=99)
    with pytest.raises(UserError, match="sentencepiece has no min_count, got 2"):
        tokenizers.make("sentencepiece", CORPUS, min_count=2)


def test_texts_that_are_cut_are_counted_in_one_line(clip, caplog):
    # 3, 4, 5 and 6 ids; only the last two do not fit
    texts = ["a", "a dog", "a red dog", "a red dog ran"]
    with caplog.at_level(logging.WARNING):
        rows = tokenizers.encode(clip, texts * 600, 4, "training")
    assert torch.equal(rows, clip.encode_all(texts * 600, 4))
    assert [record.getMessage() for record in caplog.records] == [
        "1,200 of 2,400 training texts are longer than 4 tokens and were cut"
    ]
    caplog.clear()
    tokenizers.encode(clip, texts, 6, "training")
    assert not caplog.records
