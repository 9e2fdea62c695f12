"""The study of four domains: bases, maps, and the tables that nbs/studies/domains.ipynb reads.

    python scripts/domains.py OUT                       # all of it: some two hours of one core
    python scripts/domains.py OUT --only countdown      # one domain
    python scripts/domains.py OUT --seeds 3 4 5 --first 24 --tables DIR   # the same with other bases
    python scripts/domains.py OUT --only operators countdown units --steps 160 --first 12 --tables DIR
                                                        # RL from the end of an SFT of 160 steps alone

Six bases a domain, three of each kind, are pretrained in OUT/bases; from each of them `gp-spectral map --preset
tiny-domains` trains SFT, RL and its twins in OUT/maps. What is there already is not made again. The tables of all
maps, with the columns `domain` and `kind`, are written to DIR, by default OUT/tables.
"""

import argparse
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd

from gp_spectral.book import write_table
from gp_spectral.domains import DOMAINS
from gp_spectral.healing import healing_map

ROOT = Path(__file__).resolve().parent.parent
KINDS = {  # shares of the meanings that a base has met
    "weak": "ood=.99,random=.01",  # the trained rule hardly ever
    "firm": "id=.35,ood=.40,random=.25",
}
SIZES = dict(operators=3, countdown=3, units=3, alphabet=5)
KEPT = ("evaluations", "forced", "base", "gate", "points")


def base_of(out, domain, kind, seed):
    return out / "bases" / domain / kind / str(seed)


def pretrain(out, domain, kind, seed):
    "A base, unless it is there; the bits are the same each time."
    folder = base_of(out, domain, kind, seed)
    if (folder / "model.safetensors").exists():
        return
    told = dict(task=domain, size=SIZES[domain], mix=KINDS[kind], seed=seed, steps=1000, every=500, threads=1)
    told |= dict(layers=3, hidden=64, out=folder)
    words = [x for k, v in told.items() for x in (f"--{k}", str(v))]
    subprocess.run([sys.executable, str(ROOT / "scripts/pretrain.py"), *words], check=True, stdout=subprocess.DEVNULL)
    print(f"base  {domain} {kind} {seed}", flush=True)


def make_map(out, domain, kind, seeds, first, workers, steps=None):
    "The folder of a map, made unless it is finished."
    bases = " ".join(str(base_of(out, domain, kind, seed)) for seed in seeds)
    told = dict(task=domain, cards=str(SIZES[domain]), bases=bases)
    told |= dict(sft_steps=str(steps), ppo_starts="1.0") if steps else {}
    page = healing_map("tiny-domains", 1, first, out / "maps" / f"{domain}-{kind}-{first}", told, workers=workers)[0]
    return page.parent


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path, help="folder of bases, maps and tables")
    p.add_argument("--only", nargs="+", choices=DOMAINS, default=list(DOMAINS), help="these domains")
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the bases")
    p.add_argument("--first", type=int, default=0, help="number of the first repetition, of SFT and RL")
    p.add_argument("--steps", type=int, help="of SFT, and RL from its end alone; default: as the preset says")
    p.add_argument("--workers", type=int, default=2, help="processes at once")
    p.add_argument("--tables", type=Path, help="where the tables go; default: OUT/tables")
    a = p.parse_args()
    grid = [(domain, kind) for domain in a.only for kind in KINDS]
    with ThreadPoolExecutor(a.workers) as pool:
        list(pool.map(lambda at: pretrain(a.out, *at), [(*at, seed) for at in grid for seed in a.seeds]))
    parts = {name: [] for name in KEPT}
    for domain, kind in grid:
        root = make_map(a.out, domain, kind, a.seeds, a.first, a.workers, a.steps)
        for name in KEPT:
            rows = pd.read_parquet(root / "tables" / f"{name}.parquet")
            parts[name].append(rows.assign(domain=domain, kind=kind))
    where = a.tables or a.out / "tables"
    where.mkdir(parents=True, exist_ok=True)
    for name, tables in parts.items():
        write_table(pd.concat(tables, ignore_index=True), where / f"{name}.parquet")


if __name__ == "__main__":
    main()
