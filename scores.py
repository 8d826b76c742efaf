"""How right an answer is, as the benchmarks count it, and how sure a mean of such scores is.

Each metric gets an answer, the expected answers of one example, and its options (of a multiple choice), and
gives a number from 0 to 1. The accuracy of a set is the mean of these numbers.
"""
import re

import numpy as np

from config import BadExample

CHOOSE = re.compile(r"^[ \t]*\(?([A-Z])[.):][ \t]*(\S.*?)\s*$", re.MULTILINE)       # "A. a cat", "(B) a dog"
LEAD = re.compile(r"^\s*(the\s+)?(correct\s+)?answer(\s+is\b|\s*:)\s*:?", re.IGNORECASE)


def exact(answer, expected, options):
    """1 if it is one of the expected answers. Case, spaces at the ends or repeated, and a final dot do not
    count."""
    return float(normal(answer) in map(normal, expected))


def normal(answer):
    return " ".join(answer.lower().split()).rstrip(".").strip()


# -- VQA v2 --------------------------------------------------------------------------------------------------

NUMBERS = {name: str(max(0, i - 1)) for i, name in enumerate(
    "none zero one two three four five six seven eight nine ten".split())}
CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
    he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've
    mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't
    shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's
    something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've
    they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
    where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've""".split()
# What is written with one apostrophe too few -> the word. The last one is the other way round there, too.
APOSTROPHES = {word[:at] + word[at + 1:]: word for word in CONTRACTIONS
               for at, letter in enumerate(word) if letter == "'"} | {"somebody'd": "somebodyd"}


def vqa(answer, expected, options):
    """VQA v2: ten people answered. An answer is right by a third for each other person who gave it, at most
    wholly, averaged over leaving out each of the ten in turn. (Goyal et al., arXiv 1612.00837; the formula
    and the normal form of an answer are those of the official script, vqaEval.py.)

    One expected answer counts as ten times the same. The script brings expected answers only partly into
    normal form; they are already in it in VQA's files. Here they always are, as in the evaluation of TextVQA.
    """
    given, people = vqa_normal(answer), [vqa_normal(each) for each in expected]
    people = people * 10 if len(people) == 1 else people
    same = people.count(given)
    return sum(min(1, (same - (each == given)) / 3) for each in people) / len(people)


def vqa_normal(answer):
    """Without punctuation and articles, in small letters, numbers up to ten as digits, apostrophes in
    place."""
    text = " ".join(answer.split())
    joined = re.search(r"\d,\d", text)                      # 1,000: then every sign is deleted
    words = text
    for sign in ';/[]"{}()=+\\_-><@`,?!':
        beside_a_space = f"{sign} " in text or f" {sign}" in text
        words = words.replace(sign, "" if joined or beside_a_space else " ")
    words = re.sub(r"\.(?!\d)", "", words).lower().split()
    words = [NUMBERS.get(word, word) for word in words]
    return " ".join(APOSTROPHES.get(word, word) for word in words if word not in ("a", "an", "the"))


# -- documents and charts ------------------------------------------------------------------------------------

def anls(answer, expected, options):
    """DocVQA, ST-VQA: average normalized Levenshtein similarity. 1 - edits / length of the longer text, if
    that is more than a half, else 0; of the best of the expected answers. Capital letters do not count.
    (Biten et al., arXiv 1905.13648, equation 1; Mathew et al., arXiv 2007.00398)
    """
    return max(similarity(" ".join(answer.lower().split()), " ".join(each.lower().split()))
               for each in expected)


def similarity(a, b):
    distance = edits(a, b) / max(len(a), len(b), 1)
    return 1 - distance if distance < 0.5 else 0.0


def edits(a, b):
    """Letters to insert, delete or replace to make one text of the other (Levenshtein)."""
    above = list(range(len(b) + 1))
    for i, letter in enumerate(a, start=1):
        row = [i]
        for j, other in enumerate(b, start=1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (letter != other)))
        above = row
    return above[-1]


def relaxed(answer, expected, options):
    """ChartQA: a number may be wrong by 5 %, what is no number must be the same but for small and capital
    letters. "12%" is 0.12. (Masry et al., arXiv 2203.10244, section 5.1; Methani et al., arXiv 1909.00997)

    An expected zero must be met as text, as there is no 5 % of it.
    """
    return float(any(close(answer, each) for each in expected))


def close(answer, expected):
    got, wanted = number(answer), number(expected)
    if got is not None and wanted:
        return abs(got - wanted) / abs(wanted) <= 0.05
    return answer.strip().lower() == expected.strip().lower()


def number(text):
    """-> float, or None. No commas and no units, as in the scripts in use."""
    text = text.strip()
    if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d{1,2})? *%?", text, re.IGNORECASE | re.ASCII):
        return None
    value = float(text.rstrip("%"))
    return value / 100 if text.endswith("%") else value


# -- multiple choice -----------------------------------------------------------------------------------------

def choice(answer, expected, options):
    """1 if the answer names the option that is expected: by its letter ("B", "(b)", "B. a dog", "The answer
    is B.") or by its text. The expected answer may be either, too. Letters as ScienceQA and MMBench have them
    (arXiv 2209.09513, 2307.06281); no model is asked what an answer may mean.
    """
    wanted = {chosen(each, options) for each in expected} - {None}
    if not wanted:
        raise BadExample(f"the expected answer {expected[0][:60]!r} is none of the options {options}")
    return float(chosen(answer, options) in wanted)


def chosen(answer, options):
    """-> the letter of the option that an answer names, or None."""
    texts = {normal(text): letter for letter, text in options.items()}
    answer = normal(LEAD.sub("", answer))
    if answer in texts:
        return texts[answer]
    named = re.fullmatch(r"\(?([a-z])\)?|\(?([a-z])[.):]\s*(.*)", answer, re.DOTALL)
    letter = (named[1] or named[2]).upper() if named else None
    # "A. a dog" where A is the cat: it names two.
    return letter if letter in options and texts.get(named[3] or "", letter) == letter else None


def options_of(row):
    """{letter: text} from the example's "options" (a list), or from lines such as "A. a cat" of its
    question."""
    given = row.get("options")
    if given is None:
        return dict(CHOOSE.findall(row["conversations"][-2]["value"]))
    if not isinstance(given, list) or not all(isinstance(text, str) for text in given) or len(given) > 26:
        raise BadExample(f"'options' must be a list of at most 26 texts, found {str(given)[:60]!r}")
    return {chr(ord("A") + i): text for i, text in enumerate(given)}


# -- what is known of an example, and of many ----------------------------------------------------------------

METRICS = {"exact": exact, "vqa": vqa, "anls": anls, "relaxed": relaxed, "choice": choice}


def expected_of(row):
    """All answers that count as right: the example's "answers", or else its last reply."""
    answers = row.get("answers")
    if answers is None:
        return [row["conversations"][-1]["value"]]
    # VQA's own files have {"answer": TEXT, ...} for each person.
    texts = [each.get("answer") if isinstance(each, dict) else each for each in answers
             ] if isinstance(answers, list) else []
    if not texts or not all(isinstance(text, str) for text in texts):
        raise BadExample(f"'answers' must be a list of texts, found {str(answers)[:60]!r}")
    return texts


def score(metric, answer, row):
    """-> from 0 to 1. Raises BadExample where the row can't be scored so."""
    options = options_of(row) if metric == "choice" else {}
    if metric == "choice" and len(options) < 2:
        raise BadExample("it has no options: give them under 'options', or in lines such as \"A. a cat\"")
    return METRICS[metric](answer, expected_of(row), options)


def interval(values, resamples=1000, seed=0):
    """Scores of n examples -> the 95 % interval of their mean, by the bootstrap (Efron 1979): where the means
    of n examples drawn anew from these, with replacement, lie in 95 of 100 draws.

    Examples with the same score are drawn together (a multinomial), which is the same and much faster.
    """
    each, counts = np.unique(np.asarray(values, np.float64), return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(values), counts / len(values), size=resamples)
    return np.percentile(drawn @ each / len(values), (2.5, 97.5)).tolist()


def yes_no(pairs):
    """(answer, expected) of a set whose expected answers are all yes or no -> accuracy, precision, recall and
    F1 of "yes", and the share of "yes", as POPE has them (Li et al., arXiv 2305.10355); None for other sets.

    An answer is "no" if no or not is a word of its first sentence, else "yes", as in POPE's script.
    """
    wanted = [normal(expected) for _, expected in pairs]
    if not pairs or set(wanted) - {"yes", "no"}:
        return None
    given = [bool({"no", "not"} & set(answer.partition(".")[0].lower().replace(",", " ").split()))
             for answer, _ in pairs]
    said, true = ~np.array(given), np.array(wanted) == "yes"
    both = int((said & true).sum())
    precision, recall = both / max(1, int(said.sum())), both / max(1, int(true.sum()))
    return {"accuracy": float((said == true).mean()), "precision": precision, "recall": recall,
            "f1": 2 * precision * recall / max(precision + recall, 1e-12), "yes": float(said.mean())}
