"""Markdown pages as the tests of docs read them: headings, blocks, figures, commands."""
import ast
import functools
import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
HEREDOC = re.compile(r"^python - <<'EOF'\n(.*?)^EOF$", re.M | re.S)


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(page):
    """-> [(language, text)], in order."""
    return BLOCK.findall(page)


def prose(page):
    """What is left without the blocks, the paths of links and pictures, and `code`."""
    return re.sub(r"\]\([^)]*\)|`[^`\n]*`", "", BLOCK.sub("", page))


def headings(page):
    """The level of each heading: [1, 2, 2, 3]"""
    return [len(marks) for marks in re.findall(r"^(#+) ", BLOCK.sub("", page), re.M)]


def sections(page):
    """The text of each section, from one heading to the next."""
    return re.split(r"^#+ ", prose(page), flags=re.M)


def figures(text):
    """All numbers of two digits or more. Smaller ones may be words in one of the languages."""
    return sorted(number for number in re.findall(r"\d+(?:[.,]\d+)*", text) if len(number) > 1)


def links(page):
    """Paths inside of the project that the page points to."""
    found = re.findall(r"\]\(([^)#\s]+)", BLOCK.sub("", page))
    return [path for path in found if not re.match(r"[a-z]+:", path)]


def quoted(block):
    """A python block: `# file` and lines of that file -> the lines that are not there."""
    first, *lines = block.splitlines()
    there = {line.strip() for line in read(first.removeprefix("# ").strip()).splitlines()}
    return [line for line in lines if line.strip() not in there | {"...", ""}]


def programs(block):
    """The programs between <<'EOF' and EOF of a bash block."""
    return HEREDOC.findall(block)


def commands(block):
    """A bash block without its programs -> [(script, its flags)]"""
    found = []
    lines = HEREDOC.sub("", block).replace("\\\n", " ").splitlines()
    for line in lines:
        # Quotes may go over several lines (python -c '...'); such a command names no script of ours.
        try:
            words = shlex.split(line, comments=True)
        except ValueError:
            continue
        script = None
        for word in words:
            if re.fullmatch(r"[\w/.]+\.py", word):
                script = word
                found.append((script, []))
            elif re.fullmatch(r"[|;&]+|\d?>.*|do|done", word) or word.endswith(";"):
                script = None
            elif script and word.startswith("--"):
                found[-1][1].append(word.split("=")[0])
    return found


@functools.cache
def classes():
    """{name: its node} of all classes that commands make their flags from."""
    files = [path for folder in ("", "toy", "examples", "docs") for path in (ROOT / folder).glob("*.py")]
    return {node.name: (path, node) for path in files
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.ClassDef) and "knob(" in ast.unparse(node)}


def fields_of(name):
    """The fields of a config class and of those that it is made from, read from the source."""
    _, node = classes()[name]
    bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
    own = {part.target.id for part in node.body if isinstance(part, ast.AnnAssign)}
    return own.union(*map(fields_of, bases))


def unknown_flags(script, flags):
    """Those of the flags that a script does not have.
    Benchmarks have no config class: there, those that do not stand in the source."""
    script = "train.py" if script.startswith("runs/") else script       # a changed copy of it, in an exercise
    path = ROOT / script
    if not path.is_file():
        return [f"there is no {script}"]
    own = [name for name, (where, _) in classes().items() if where == path]
    # A script without a class of its own uses that of another file, as train.py does.
    own = own or [name for name in classes() if re.search(rf"\b{name}\b", read(script))]
    names = set().union(*map(fields_of, own))
    known = {f"--{name.rstrip('_')}" for name in names} | {f"--no-{name}" for name in names} | {"--help"}
    return [flag for flag in flags if flag not in known and f'"{flag}"' not in read(script)]
