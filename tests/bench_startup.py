"""From the command to the first step, on the toy and on a file as large as LLaVA's mix of 665,000 examples.

    python tests/bench_startup.py                   # some minutes, about 1 GB of temporary disk
    python tests/bench_startup.py --examples 10000  # a first look
    python tests/bench_startup.py --examples 10000000 --counted     # 12 GB of temporary disk

The large file is used three times: `cold` counts all tokens and keeps the counts beside the file, `warm`
finds them there. With --counted no text is tokenised: the file is looked through as in a first start, and
made-up counts are put beside it. The toy's backbones are loaded: what is measured is the start, not the
reading of weights.

The time is from the command to the line of the first step in metrics.jsonl, less the step itself. CPU time is
the rank's at that moment, the step included; on a machine that others use too it is the number to trust.
Memory is that of a rank and its two data workers together, at that moment, without what lies in mapped files
(libraries): those pages are there once for all ranks. `peak` is the most that the rank itself had until then.
"""
import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DIFFERENT = 200_000                                         # examples; a larger file repeats them
ROOT = Path(__file__).resolve().parent.parent
WORDS = "a the red blue circle square cat dog street man woman near two left right of on in is".split()


def write_examples(file, examples, picture):
    """94 % with a picture and about 140 tokens, 6 % without and up to 900. One large list, as LLaVA's."""
    rng, rows = random.Random(0), []
    def said(n):
        return " ".join(rng.choices(WORDS, k=n))
    with open(file, "w") as out:
        for i in range(examples):
            if i >= DIFFERENT:                              # drawing more would take too long
                out.write("," + rows[i % DIFFERENT])
                continue
            image, words = i % 50 >= 3, rng.expovariate(1 / 140) if i % 50 >= 3 else rng.expovariate(1 / 880)
            turns = [{"from": ("human", "gpt")[turn % 2], "value": said(20)}
                     for turn in range(2 + 2 * int(min(words, 900) / 40))]
            if image:
                turns[0]["value"] = "<image>\n" + turns[0]["value"]
            row = {"id": str(i), **({"image": picture} if image else {}), "conversations": turns}
            rows.append(json.dumps(row))
            out.write(("[" if i == 0 else ",") + rows[-1])
        out.write("]")


def count_without_tokens(file, images):
    """What a first start does with the file before it counts, and a file of counts as it would keep it."""
    script = """if True:
        import sys, time, resource
        import numpy as np
        from check import CheckConfig, open_file
        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
        cfg = CheckConfig(file=sys.argv[2], image_dir=sys.argv[3], max_length=256)
        open_file(CheckConfig(file=sys.argv[1], image_dir=sys.argv[3]))
        before, began = peak(), time.time()
        data = open_file(cfg)
        took, grown = time.time() - began, peak() - before
        print(f"  looked through in {took:.0f} s; memory grew by {grown:.2f} GB at most")
        drawn = np.random.default_rng(0).integers(30, 256, len(data))
        data.store.save(np.column_stack([data.places, drawn, np.arange(len(data)) % 50 >= 3]))
    """
    small = file.with_name("small.json")
    write_examples(small, 10, next(images.iterdir()).name)
    subprocess.run([sys.executable, "-c", script, str(small), str(file), str(images)], cwd=ROOT, check=True)


def processes(pid):
    """This process and all below it."""
    below = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid] + [each for child in below for each in processes(int(child))]


def own_gigabytes(pid):
    """Not backed by a file; a page that n processes share counts 1/n in each."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon", "Pss_Shmem"))) / 2 ** 20


def peak_gigabytes(pid):
    """The most that a process ever had, without what lies in files."""
    of = dict(line.split(":") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return (int(of["VmHWM"].split()[0]) - int(of["RssFile"].split()[0])) / 2 ** 20


def cpu_seconds(pid):
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def start(name, folder, ranks, *flags):
    """One start of train.py, ended after its first step."""
    run = folder / "runs" / "r"
    launch = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--master_port=0",
              "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"] if ranks > 1 else []
    command = [sys.executable, *launch, "train.py", *flags, "--run_root", str(run.parent), "--run_id", "r",
               "--overwrite", "--num_workers", "2", "--val_json", "", "--max_steps", "100"]
    began, metrics = time.time(), run / "metrics.jsonl"
    metrics.unlink(missing_ok=True)
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        while not (metrics.exists() and "\n" in metrics.read_text()):
            assert process.poll() is None, (folder / "log").read_text()[-3000:]
            time.sleep(0.05)
        took = time.time() - began
        step = json.loads(metrics.read_text().splitlines()[0])
        own = {pid: own_gigabytes(pid) for pid in processes(process.pid)
               if b"torch.distributed.run" not in Path(f"/proc/{pid}/cmdline").read_bytes()}
        rank = max(own, key=own.get)
        busy, peak = cpu_seconds(rank), peak_gigabytes(rank)
        process.kill()
        process.wait()
    worked = step["positions"] * (1 - step["padding"]) / step["tokens_per_second"] * (1 - step["data_wait"])
    print(f"{name:<24}{took - worked:8.1f} s, CPU time {busy:5.1f} s; "
          f"{sum(own.values()) / ranks:.2f} GB a rank, peak {peak:.2f} GB", flush=True)


def main(args):
    began = time.perf_counter()
    subprocess.run([sys.executable, "train.py", "--help"], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    print(f"{'--help':<28}{time.perf_counter() - began:10.2f} s")
    if not (ROOT / "data" / "toy" / "align.json").exists():
        subprocess.run([sys.executable, "toy/world.py"], cwd=ROOT, check=True, capture_output=True)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for again in ("", ", again"):
            start("toy, align" + again, folder, args.ranks, "--stage", "align")
        file = folder / "large.json"
        images = ROOT / "data" / "toy" / "images"
        write_examples(file, args.examples, next(images.iterdir()).name)
        name = f"{args.examples:,} examples, {file.stat().st_size / 1e9:.1f} GB"
        print(name)
        if args.counted:
            count_without_tokens(file, images)
        for which in ("warm", "warm") if args.counted else ("cold", "warm", "warm"):
            start(f"  {which}, {args.ranks} ranks", folder, args.ranks, "--stage", "finetune", "--no_align",
                  "--max_length", "256", "--global_batch_size", "8", "--train_json", str(file),
                  "--image_dir", str(images))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=665_000)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--counted", action="store_true", help="put made-up counts beside the file")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(parser.parse_args())
