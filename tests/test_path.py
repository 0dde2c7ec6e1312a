"""The promise of base.py: one gradient's path is short enough to be read."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] / "gcjax"
PATH = {
    "aggregate.py": """update split join_small part_small exchanged lengths
        default_levels _residual nearest_admitted _refuse_summed""",
    "collectives.py": "gather all_reduce switch",
    "exchange.py": "compressed_mean gather_with mean_with _needed",
    "compressors/sparsify.py": """random_k largest _count first_of_each_layer
        _word_counts keep counts _picked _pack_values _decode_values""",
    "wire.py": """positions owner running_sum select_bit keep_lowest pack_bits
        unpack_bits""",
    "base.py": "flatten unflatten pick",
}


def code_lines(file: Path, names: list[str]) -> int:
    """Lines of the named functions that are neither docstring, comment nor blank."""
    source = file.read_text()
    lines, found, count = source.splitlines(), set(), 0
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef) or node.name not in names:
            continue
        found.add(node.name)
        taken = set(range(node.lineno, node.end_lineno + 1))
        for inner in ast.walk(node):
            if isinstance(inner, ast.FunctionDef) and ast.get_docstring(inner):
                doc = inner.body[0]
                taken -= set(range(doc.lineno, doc.end_lineno + 1))
        text = [lines[i - 1].strip() for i in taken]
        count += sum(bool(t) and not t.startswith("#") for t in text)
    assert found == set(names), set(names) - found
    return count


def test_the_path_of_one_gradient_is_under_400_lines_of_code():
    counts = {f: code_lines(ROOT / f, names.split()) for f, names in PATH.items()}
    assert sum(counts.values()) < 400, counts


def test_the_path_is_listed_in_base():
    text = ast.get_docstring(ast.parse((ROOT / "base.py").read_text()))
    for name in ("update", "split", "join_small", "reselect", "exchanged"):
        assert f"aggregate.{name}" in text
    assert "collectives.gather" in text
