import hashlib
import re

import pytest

from tfm_jax.data.splits import Keep, check_rule, split_in_name
from tfm_jax.errors import UserError


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.txt", "train"),
        ("wiki.valid.tokens.gz", "validation"),
        ("My-Val_02.jsonl", "validation"),
        ("dev.txt", "validation"),
        ("TEST", "test"),
        ("training-00001-of-2", "train"),
        ("train0.txt", "train"),
        ("validation", "validation"),
        ("trainer.txt", None),
        ("contest.txt", None),
        ("devtools.txt", None),
        ("unsupervised", None),
        ("train_test.txt", None),
        ("val_dev.txt", "validation"),
        ("", None),
    ],
)
def test_the_split_in_a_name_is_a_word_of_its_own(name, split):
    assert split_in_name(name) == split


def test_keep_shares_every_key_out_once_by_its_md5():
    keys = [f"folder/{i}.txt" for i in range(4000)]
    held = [key for key in keys if Keep("validation", 0.05)(key)]
    assert [key for key in keys if not Keep("train", 0.05)(key)] == held
    assert held == [key for key in keys if int(hashlib.md5(key.encode()).hexdigest()[:16], 16) < 0.05 * 2**64]
    assert 140 < len(held) < 260  # 200, standard deviation 14


def test_holding_out_more_keeps_what_was_held_out():
    keys = [str(i) for i in range(1000)]
    held = [{key for key in keys if Keep("validation", fraction)(key)} for fraction in (0.05, 0.2, 0.5)]
    assert held[0] < held[1] < held[2]


@pytest.mark.parametrize(
    ("rule", "fraction", "message"),
    [
        ("tial", None, "data.split is 'tial'. Did you mean 'tail'?"),
        ("?", None, "data.split is '?'. Valid: all, auto, hash, names, tail."),
        ("auto", 0.0, "data.valid_fraction is 0.0; it must lie between 0 and 1."),
        ("auto", 1.0, "data.valid_fraction is 1.0; it must lie between 0 and 1."),
        ("hash", float("nan"), "data.valid_fraction is nan; it must lie between 0 and 1."),
    ],
)
def test_a_wrong_rule_or_fraction(rule, fraction, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        check_rule(rule, fraction)


@pytest.mark.parametrize("rule", ["auto", "names", "hash", "tail"])
def test_right_rules_pass(rule):
    assert check_rule(rule, 0.5) is None
