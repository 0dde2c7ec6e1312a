"""placeholder"""
def summary(records): return str([(r["label"], r["final"], r["status"], r["wall_seconds"]) for r in records])
def run_figure(records, path): pass
