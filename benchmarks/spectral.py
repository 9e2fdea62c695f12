"""How quick is the spectral wing? Ratios within one run, on one thread, of processor time.

    python scripts/smollm2.py OUT                                   # once: the checkpoints
    python benchmarks/spectral.py compare OUT/base OUT/sft          # comparing: published script, ours, bare factorisation
    python benchmarks/spectral.py sweep OUT/sft OUT/base            # ten strengths of UV merge: published, ours cold, ours cached
    python benchmarks/spectral.py memory                            # peak memory of comparing a 768 MiB pair
    python benchmarks/spectral.py scale                             # an 8B-shaped pair: planned, started, stopped (32 GB of disk)
    python benchmarks/spectral.py drivers --device cuda             # which driver for which shape

Each prints a table and puts it into benchmarks/results.md, with the command, date, processor and versions; the numbers behind it go to results.json.
The baseline is our own rendering of what the published scripts of arXiv 2508.16546 compute per matrix
(raw_metrics_angle.py: float32 SVDs of both matrices and of their difference, k x k SVDs with k = 768 at most,
projector distances, energies; svd_recover_dir.py: two SVDs and a rebuilt matrix for each k).
"""
import os
for key in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"): os.environ[key] = "1"   # before torch and numpy are imported

import argparse, multiprocessing, shutil, statistics, subprocess, sys, tempfile, time
from pathlib import Path

import torch

from common import ROOT, ratios, spread, table, write

sys.path.insert(0, str(ROOT / "scripts"))
torch.set_num_threads(1)
KS = (0.02, 0.05, 0.08, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4)


# --- the published computation, in our words

def published_factors(W, k=768):
    U, s, Vh = torch.linalg.svd(W.float(), full_matrices=False)
    k = min(k, *W.shape)
    return U[:, :k], s, Vh.T[:, :k].contiguous()


def published_pair(base, other, all_of_it=True):
    "Per pair: two SVDs, one of the difference, angles of the leading k; with `all_of_it` also energies, projector distances and residuals."
    (Ub, sb, Vb), (Ut, st, Vt) = published_factors(base), published_factors(other)
    delta = other.float() - base.float()
    torch.linalg.svd(delta, full_matrices=False)
    found = [torch.arccos(torch.linalg.svdvals(A.T @ B).clamp(-1, 1)) for A, B in ((Ub, Ut), (Vb, Vt))] + [(st - sb) / (sb + 1e-12)]
    if all_of_it:
        core = Ub.T @ delta @ Vb
        found += [core.diagonal().norm() ** 2 / delta.norm() ** 2, torch.linalg.matrix_norm(Ub @ Ub.T - Ut @ Ut.T), torch.linalg.matrix_norm(Vb @ Vb.T - Vt @ Vt.T),
                  (Ub.T @ Ut).abs().max(1).values, (Vb.T @ Vt).abs().max(1).values, (other.float() - Ub @ (Ub.T @ other.float() @ Vb) @ Vb.T).norm(), (Ub.T @ other.float() @ Vb).norm()]
    return found


def published_merge(target, donor, k):
    (Ud, _, Vd), (Ut, st, Vt) = (torch.linalg.svd(W.float(), full_matrices=False) for W in (donor, target))
    U, V = torch.cat([Ud[:, :k], Ut[:, k:]], 1), torch.cat([Vd[:k], Vt[k:]])
    return (U @ torch.diag(st) @ V).to(target.dtype)


# --- measuring

def cpu(work):
    "Processor time of a function."
    begun = time.process_time(); work()
    return time.process_time() - begun


SVDS, SCRIPT, BARE, LONG = "published: SVDs and angles", "published: all of the script", "bare: one factorisation per matrix and checkpoint", "the same, with both sides' vectors"
OURS, MORE = "ours: σ, angles, floors, verdicts", "ours, and energies, intruders"
SHIPPED, AGAIN = "`gp-spectral compare` by default: all of that, factors kept on disk", "`gp-spectral compare` once more, factors found on disk"


def compare(a):
    from gp_spectral.angles import _noise, compare_all, random_angles
    from gp_spectral import checkpoint, svd
    from gp_spectral.checkpoint import Checkpoint
    from gp_spectral.svd import _matrix, _short_side, factorize, one_thread
    base, other = map(Checkpoint, a.checkpoints)
    found = base.matrices(layers=a.layers)
    layers = sorted({m.layer for m in found})
    blocks = [layers[i:i + 5] for i in range(0, len(layers), 5)]               # the ways take turns every five layers
    one = {SVDS: lambda A, B: published_pair(A(), B(), False), SCRIPT: lambda A, B: published_pair(A(), B(), True),
           BARE: lambda A, B: (_short_side(_matrix(A())), _short_side(_matrix(B()))), LONG: lambda A, B: (factorize(A()), factorize(B()))}
    kept = tempfile.TemporaryDirectory()
    whole = {OURS: dict(details=False), MORE: {}, SHIPPED: dict(cache=f"{kept.name}/factors"), AGAIN: dict(cache=f"{kept.name}/factors")}
    options = dict(cache=False, workers=1, progress=False)
    def begin(name):                                                           # as a new process would: hashes, baselines and noise are not known yet
        if name == SHIPPED: shutil.rmtree(f"{kept.name}/factors", ignore_errors=True); svd._caches.clear()
        checkpoint._DIGESTS.clear()
    with one_thread():                                                         # what libraries do at their first call is in no one's time
        for way in one.values(): way(lambda: base.matrix(found[0]), lambda: other.matrix(found[0]))
        compare_all([base, other], layers=blocks[0][:1], **options)
    times, shapes = {name: [0.0] * a.repeats for name in (*one, *whole)}, {}
    for repeat in range(a.repeats):
        for i, block in enumerate(blocks):
            for m in (m for m in found if m.layer in block):
                for name, way in one.items():
                    with one_thread(): t = cpu(lambda: way(lambda: base.matrix(m), lambda: other.matrix(m)))
                    times[name][repeat] += t; shapes.setdefault(f"{m.shape[0]} × {m.shape[1]}", {}).setdefault(name, []).append(t)
            for name, more in whole.items():
                if not i: random_angles.cache_clear(); _noise.cache_clear()    # each run draws its random baselines itself
                begin(name)
                times[name][repeat] += cpu(lambda: compare_all([base, other], layers=block, **options | more))
        print(f"repeat {repeat + 1}: " + "; ".join(f"{name} {t[repeat]:.1f} s" for name, t in times.items()), flush=True)
    text = table(("what", "CPU seconds, median [range]", "× ours", "× bare"), [(name, spread(t), ratios(t, times[OURS]), ratios(t, times[BARE])) for name, t in times.items()])
    mean = {s: {name: 1e3 * statistics.mean(t) for name, t in by.items()} for s, by in shapes.items()}
    text += "\n\nBy shape, mean CPU milliseconds for a matrix of both checkpoints:\n\n" + table(("shape", "matrices", *one), [
        (s, len(shapes[s][BARE]) // a.repeats, *(f"{x:.1f}" for x in by.values())) for s, by in mean.items()])
    write("Comparing two checkpoints", text, f"{len(found)} matrices of {base.label} and {other.label}, {a.repeats} repeats, the ways in turn every five layers, one thread, "
          "nothing cached unless it is said.", dict(seconds=times, milliseconds_by_shape=mean))


def sweep(a):
    from gp_spectral import checkpoint
    from gp_spectral.angles import band_size
    from gp_spectral.checkpoint import Checkpoint
    from gp_spectral.svd import FactorCache, factors, one_thread
    from gp_spectral.sweep import sweep as whole_sweep, sweep_matrix
    target, donor = map(Checkpoint, a.checkpoints)
    found = target.matrices(layers=a.layers or "middle 4")
    names = ("published: each k anew", "ours, cold", "ours, factors cached on disk", "ours, factors in memory", "`sweep`, with its bookkeeping, cold", "`sweep`, with its bookkeeping, cached")
    times = {name: [0.0] * a.repeats for name in names}
    with tempfile.TemporaryDirectory() as tmp:
        kept = FactorCache(tmp)
        def pair(m, cache): return factors(target, m, cache), factors(donor, m, cache)
        def ours(m, f): any(W is None for _, W in sweep_matrix(target.matrix(m), donor.matrix(m), KS, "uv", f() if callable(f) else f))
        def published(m):
            W, D = target.matrix(m), donor.matrix(m)
            for k in KS: published_merge(W, D, band_size(min(W.shape), k))
        with one_thread():
            for m in found: pair(m, kept)
            ours(found[0], pair(found[0], None)); published(found[0])          # what libraries do at their first call is in no one's time
            for repeat in range(a.repeats):
                for m in found:
                    ready = pair(m, kept); checkpoint._DIGESTS.clear()         # a new process would have to hash the matrix
                    for name, work in zip(names, (lambda: published(m), lambda: ours(m, lambda: pair(m, None)), lambda: ours(m, lambda: pair(m, kept)), lambda: ours(m, ready))):
                        times[name][repeat] += cpu(work)
                for name, cache in zip(names[4:], (None, tmp)):
                    checkpoint._DIGESTS.clear()
                    times[name][repeat] += cpu(lambda: whole_sweep(target, donor, KS, "uv", layers=a.layers or "middle 4", cache=cache, progress=False))
                print(f"repeat {repeat + 1}: " + "; ".join(f"{name} {t[repeat]:.3g} s" for name, t in times.items()), flush=True)
    rows = [(name, spread(t), ratios(times[names[0]], t)) for name, t in times.items()]
    write("Ten strengths of the UV merge", table(("what", "CPU seconds, median [range]", "times less than published"), rows),
          f"{len(found)} matrices, k = {', '.join(f'{k:.0%}' for k in KS)} of the ranks, {a.repeats} repeats, the ways in turn for each matrix, one thread.", dict(seconds=times))


def resident(pid="self", what="VmRSS"):
    "Bytes of memory that a process has (VmRSS) or had at most (VmHWM); Linux only."
    line = next(l for l in Path(f"/proc/{pid}/status").read_text().splitlines() if l.startswith(what))
    return int(line.split()[1]) << 10


def _watched(folders, cache, queue):
    from gp_spectral.angles import compare_all
    Path("/proc/self/clear_refs").write_text("5")                              # the high-water mark begins here, after all imports
    start, begun = resident(), time.time()
    compare_all(folders, cache=cache, progress=False)                           # as many at once as it chooses by itself
    queue.put((start, resident(what="VmHWM"), time.time() - begun))


def memory(a):
    from random_checkpoint import perturb, write as make
    rows, raw = [], {}
    with tempfile.TemporaryDirectory(dir=a.folder) as tmp:
        pair = [f"{tmp}/base", f"{tmp}/tuned"]
        make(pair[0], "768mib"); perturb(pair[1], pair[0])
        for name, cache in (("nothing cached", False), ("writing the cache", f"{tmp}/factors"), ("reading the cache", f"{tmp}/factors")):
            context = multiprocessing.get_context("spawn"); queue = context.Queue()
            child = context.Process(target=_watched, args=(pair, cache, queue)); child.start()
            start, peak, seconds = queue.get(); child.join()
            rows.append((name, start >> 20, (peak - start) >> 20, f"{seconds:.0f}")); raw[name] = dict(start=start, peak=peak, seconds=seconds)
    write("Peak memory of comparing a 768 MiB pair", table(("", "at the start, MiB", "above it at the peak, MiB", "seconds"), rows),
          "Two checkpoints of 768 MiB each in bfloat16 (hidden size 1024, feed-forward 4096; scripts/random_checkpoint.py), 168 matrices, everything compared, as many at once as the rule for memory allows. "
          "The kernel's high-water mark of resident memory.", raw)


def scale(a):
    from random_checkpoint import perturb, write as make
    from gp_spectral.checkpoint import Checkpoint, preflight
    folder = Path(a.folder or tempfile.mkdtemp()); pair = [folder / n for n in ("base", "tuned")]
    if not pair[0].exists(): make(pair[0], "llama-8b")
    if not pair[1].exists(): perturb(pair[1], pair[0])
    begun = time.time(); base, other = map(Checkpoint, pair); preflight(base, other); found = base.matrices(); planned = time.time() - begun
    with tempfile.TemporaryDirectory(dir=folder) as tmp:
        out, log = Path(tmp) / "comparison", Path(tmp) / "log"
        with open(log, "w") as f:
            run = subprocess.Popen([sys.executable, "-m", "gp_spectral", "compare", *map(str, pair), "--out", str(out), "--cache", "none", "--workers", "1", "--device", "cpu"],
                                   stdout=f, stderr=f, cwd=ROOT)
        begun, peak, done = time.time(), 0, {}
        try:
            while len(done) < min(a.matrices, len(found)) and run.poll() is None:
                time.sleep(0.05)
                try: peak = max(peak, resident(run.pid, "VmHWM"))
                except (OSError, StopIteration): continue                      # it has just ended
                for f in (out / "parts").glob("??????.json"): done.setdefault(int(f.stem), time.time() - begun)
        finally: run.kill(); run.wait()
        if len(done) < min(a.matrices, len(found)) and not (out / "angles.parquet").is_file(): raise SystemExit(f"the comparison ended by itself:\n{log.read_text()[-2000:]}")
    ended, rows, last = sorted(done.items(), key=lambda x: x[1]), [], 0.0
    cost = lambda m: max(m.shape) * min(m.shape) ** 2
    for i, t in ended: rows.append((found[i].name, f"{found[i].shape[0]} × {found[i].shape[1]}", f"{t - last:.0f}")); last = t
    hours = last * sum(map(cost, found)) / sum(cost(found[i]) for i in done) / 3600
    text = table(("matrices", "planned in, s", "peak resident memory, MiB", f"hours for all, reckoned from {len(done)}"), [(len(found), f"{planned:.2f}", peak >> 20, f"{hours:.1f}")])
    write("An 8B-shaped pair", text + "\n\n" + table(("matrix", "shape", "seconds, both checkpoints"), rows),
          "Random bfloat16 weights in the shapes of Llama-3.1-8B, 16 GB each, largest matrices first, one at a time, one thread, stopped by a kill. The first matrix carries the start of the program; "
          "the hours go by long side × short side².", dict(planned=planned, peak=peak, seconds=dict((found[i].name, t) for i, t in ended), hours_reckoned=hours))
    if not a.folder: shutil.rmtree(folder)


def drivers(a):
    from gp_spectral.svd import time_drivers
    rows, raw = [], {}
    for shape in ((576, 192), (576, 576), (1536, 576), (4096, 1024), (4096, 4096), (14336, 4096))[: None if a.device != "cpu" else 4]:
        found = raw[f"{shape[0]} × {shape[1]}"] = time_drivers(shape, a.device); best = min(found, key=found.get)
        rows.append((f"{shape[0]} × {shape[1]}", *(f"{found[k] / found[best]:.2f}" for k in sorted(found)), best))
    write(f"Drivers on {a.device}", table(("shape", *sorted(found), "chosen"), rows), "Time relative to the quickest; all in float64.", dict(seconds=raw))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = p.add_subparsers(dest="what", required=True, metavar="compare | sweep | memory | scale | drivers")
    for name, pair in (("compare", "base and what was made of it"), ("sweep", "target and donor")):
        c = sub.add_parser(name); c.add_argument("checkpoints", nargs=2, help=pair); c.add_argument("--repeats", type=int, default=3)
        c.add_argument("--layers", help="e.g. 'middle 4'; default: all (sweep: the middle 4)")
    c = sub.add_parser("memory"); c.add_argument("--folder", help="where there is room for 3 GB; default: the system's temporary folder")
    c = sub.add_parser("scale"); c.add_argument("--folder", help="where base and tuned are, or are to be made and left; default: a temporary one")
    c.add_argument("--matrices", type=int, default=2, help="stop after so many (default 2)")
    c = sub.add_parser("drivers"); c.add_argument("--device", default="cpu")
    a = p.parse_args(); globals()[a.what](a)


if __name__ == "__main__": main()
