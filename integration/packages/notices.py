"""Licences of the libraries inside the shipped programs: `notices.py ROOT` prints each crate with its licence, then each
licence text that the crates bring, once, with the crates it came with.

What is in a program is what `cargo tree` says for its normal dependencies; texts are the crates' own files.
"""

import collections
import json
import pathlib
import re
import subprocess
import sys

PROGRAMS = ["baton-router", "baton-workerd", "baton-integration"]
TEXTS = re.compile(r"^(licen[cs]e|copying|notice|unlicense|copyright)", re.IGNORECASE)


def cargo(root, *args):
    return subprocess.run(
        ["cargo", *args], cwd=root, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def main(root):
    target = "x86_64-unknown-linux-gnu"
    packages = [flag for program in PROGRAMS for flag in ("-p", program)]
    tree = cargo(root, "tree", "--locked", *packages, "-e", "normal", "--prefix", "none",
                 "--target", target, "--format", "{p}")
    used = {tuple(line.split()[:2]) for line in tree.splitlines() if line}
    metadata = json.loads(cargo(root, "metadata", "--locked", "--format-version", "1", "--filter-platform", target))
    crates = [
        package for package in metadata["packages"]
        if package["source"] and (package["name"], "v" + package["version"]) in used
    ]
    crates.sort(key=lambda crate: (crate["name"], crate["version"]))
    print("Libraries in Baton's programs, with the licences they are under.\n")
    texts = collections.defaultdict(list)
    for crate in crates:
        name = f"{crate['name']} {crate['version']}"
        print(f"{name}: {crate['license'] or 'see its text below'}")
        folder = pathlib.Path(crate["manifest_path"]).parent
        for file in sorted(folder.iterdir()):
            if file.is_file() and TEXTS.match(file.name):
                text = file.read_text(encoding="utf-8", errors="replace").strip()
                texts["\n".join(line.rstrip() for line in text.splitlines())].append(name)
    for text, names in sorted(texts.items(), key=lambda item: item[1]):
        print("\n" + "=" * 80)
        print("\n".join(sorted(set(names))))
        print("-" * 80)
        print(text)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
