"""Speed and memory of fusedrnn against torch.nn, measured side by side.

    python -m benchmarks.run --suite cpu      measure; rows go to results/<machine>/
    python -m benchmarks.plot                 draw the committed rows
    python -m benchmarks.report               write README's tables from the committed rows
    python -m benchmarks.compare A B          two row files; fails if B lost speed or memory beyond the noise
"""
