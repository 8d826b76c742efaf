"""scores.py: every number here was computed by hand, from the formula that its source gives."""
import pytest

from config import BadExample
from helpers import talk
from scores import (APOSTROPHES, anls, chosen, edits, exact, expected_of, interval, number, options_of,
                    relaxed, score, vqa, vqa_normal, yes_no)


@pytest.mark.parametrize("answer, want", [
    ("A star", 1), (" a  STAR. ", 1), ("heart", 1), ("star", 0), ("", 0)])
def test_exact(answer, want):
    assert exact(answer, ["a star", "Heart."], {}) == want


# -- VQA -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("same, want", [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_counts_how_many_of_ten_people_agree(same, want):
    """Three agree: without one of them two are left, 2/3, three times; without another, 3/3, seven times.
    (3 * 2/3 + 7) / 10 = 0.9. The paper's min(n / 3, 1) would be 1."""
    people = ["red"] * same + [f"other {i}" for i in range(10 - same)]
    assert vqa("Red", people, {}) == pytest.approx(want)


def test_vqa_with_one_expected_answer_is_right_or_wrong():
    assert vqa("two", ["2"], {}) == 1 and vqa("three", ["2"], {}) == 0


@pytest.mark.parametrize("answer, want", [
    ("The Red dog.", "red dog"), ("an apple", "apple"), ("two", "2"), ("None", "0"), ("ten", "10"),
    ("eleven", "eleven"), ("dont", "don't"), ("couldnt've", "couldn't've"), ("yall'll", "y'all'll"),
    ("3.5", "3.5"), ("U.S.", "us"), ("1,000", "1000"),          # with such a number, all signs are deleted
    ("red/blue", "red blue"), ("red / blue", "red blue"),       # beside a space a sign is deleted
    ("t-shirt", "t shirt"), ("yes!", "yes"), ("what?  no", "what no"), ("a\nb\tthe", "b"), ("", "")])
def test_the_normal_form_of_vqa(answer, want):
    assert vqa_normal(answer) == want


def test_words_with_one_apostrophe_too_few():
    """As in the official table: of two apostrophes either may be missing, not both."""
    assert APOSTROPHES["hadnt've"] == "hadn't've" and APOSTROPHES["hadn'tve"] == "hadn't've"
    assert "hadntve" not in APOSTROPHES and APOSTROPHES["somebody'd"] == "somebodyd"
    assert {"lets", "shes", "its"}.isdisjoint(APOSTROPHES)      # they are not in the table


# -- documents and charts ------------------------------------------------------------------------------------

@pytest.mark.parametrize("a, b, want", [("", "", 0), ("", "abc", 3), ("kitten", "sitting", 3),
                                        ("abc", "abc", 0), ("ab", "ba", 2), ("flaw", "lawn", 2)])
def test_edits(a, b, want):
    assert edits(a, b) == edits(b, a) == want


@pytest.mark.parametrize("answer, want", [
    ("Coca Cola", 1), ("  coca   COLA", 1), ("coca cola company", 0.5294),  # 8 of 17 wrong: 1 - 8/17
    ("cola", 1), ("colla", 0.8), ("coca", 0.75),                            # the other expected answer
    ("pepsi", 0), ("", 0)])
def test_anls(answer, want):
    assert anls(answer, ["Coca Cola", "cola"], {}) == pytest.approx(want, abs=1e-4)


def test_anls_is_zero_at_exactly_a_half():
    assert anls("ab", ["abcd"], {}) == 0 and anls("abc", ["abcd"], {}) == 0.75


@pytest.mark.parametrize("answer, expected, want", [
    ("105", "100", 1), ("95", "100", 1), ("105.1", "100", 0), ("94.9", "100", 0), ("-100", "100", 0),
    ("12%", "0.12", 1), ("12.5%", "12%", 1), ("12", "12%", 0), ("0", "0", 1), ("0.001", "0", 0),
    ("Red", "red", 1), ("reds", "red", 0), ("2,000", "2000", 0), ("1e2", "100", 1), ("nan", "100", 0),
    ("100 cats", "100", 0), ("-95", "-100", 1)])
def test_relaxed(answer, expected, want):
    assert relaxed(answer, [expected], {}) == want


def test_numbers_are_plain_numbers():
    assert number("5 %") == 0.05 and number(".5") == 0.5 and number("٣") is None and number("inf") is None


# -- multiple choice -----------------------------------------------------------------------------------------

OPTIONS = {"A": "a cat", "B": "a dog", "C": "B"}


@pytest.mark.parametrize("answer, letter", [
    ("A", "A"), ("a", "A"), ("(a)", "A"), ("A.", "A"), ("A) a cat", "A"), ("a. A CAT.", "A"), ("a cat", "A"),
    ("The answer is A.", "A"), ("Answer: (A)", "A"), ("the correct answer is a dog", "B"),
    ("B", "C"),                                             # it is the text of C; texts come first
    ("A. a dog", None), ("D", None), ("a cat and a dog", None), ("answering A", None), ("", None)])
def test_the_option_that_an_answer_names(answer, letter):
    assert chosen(answer, OPTIONS) == letter


ASK = "<image>\nWhich is it?\nA. a star\n(B) a heart\nC: two words \nD.\nnone. of these"


@pytest.mark.parametrize("expected", ["B", "a heart"])
def test_options_stand_in_the_question_or_in_the_example(expected):
    row = {"conversations": talk(ASK, expected)}
    assert options_of(row) == {"A": "a star", "B": "a heart", "C": "two words"}
    assert [score("choice", answer, row) for answer in ("B", "a heart", "A", "heart")] == [1, 1, 0, 0]
    row = {"conversations": talk("Which?", expected), "options": ["a star", "a heart"]}
    assert [score("choice", answer, row) for answer in ("B", "a heart", "A", "C")] == [1, 1, 0, 0]


@pytest.mark.parametrize("row, said", [
    ({"conversations": talk("Which?", "B")}, "it has no options"),
    ({"conversations": talk(ASK, "E")}, "the expected answer 'E' is none of the options"),
    ({"conversations": talk(ASK, "B"), "options": "a, b"}, "'options' must be a list"),
    ({"conversations": talk(ASK, "B"), "answers": []}, "'answers' must be a list of texts"),
    ({"conversations": talk(ASK, "B"), "answers": [7]}, "'answers' must be a list of texts")])
def test_what_can_not_be_scored_is_named(row, said):
    with pytest.raises(BadExample, match=said):
        score("choice", "B", row)


def test_expected_answers():
    row = {"conversations": talk("Which?", "B")}
    assert expected_of(row) == ["B"]
    assert expected_of(row | {"answers": ["x", {"answer": "y", "answer_id": 2}]}) == ["x", "y"]


# -- of many -------------------------------------------------------------------------------------------------

def test_the_interval_of_a_mean():
    """Of 100 with 90 right the mean of a new draw has a standard deviation of sqrt(0.9 * 0.1 / 100) = 0.03:
    95 of 100 lie within 1.96 of them. The bootstrap's own noise, and steps of 0.01, are within 0.015."""
    low, high = interval([1] * 90 + [0] * 10)
    assert low == pytest.approx(0.9 - 0.0588, abs=0.015) and high == pytest.approx(0.9 + 0.0588, abs=0.015)
    assert interval([1] * 90 + [0] * 10) == [low, high]     # the same each time
    assert interval([0] * 10 + [1] * 90) == [low, high]     # in any order
    assert interval([1] * 7) == [1, 1]
    wide, narrow = (interval([0, 0.25, 0.5, 1] * n) for n in (5, 500))
    assert wide[1] - wide[0] > 5 * (narrow[1] - narrow[0])  # 10 times: sqrt(500 / 5)


def test_yes_and_no():
    """yes to 3 of 4 that are yes, and to 1 of 6 that are no: precision 3/4, recall 3/4, F1 3/4, yes 4/10."""
    pairs = [("Yes, there is.", "yes")] * 3 + [("No.", "Yes")] + [("yes", "no")] + [
        ("no", "no"), ("There is not one. Yes!", "no"), ("NO", "no."), ("no, none", "no"), ("No", "no")]
    assert yes_no(pairs) == pytest.approx({"accuracy": 0.8, "precision": 0.75, "recall": 0.75, "f1": 0.75,
                                           "yes": 0.4})
    assert yes_no([("maybe", "no")])["yes"] == 1            # what is not no is yes, as in POPE
    assert yes_no([("no", "yes")])["f1"] == 0
    assert yes_no([("yes", "yes"), ("two", "two")]) is None and yes_no([]) is None
