"""Speed and memory of fusedrnn against torch.nn, measured side by side.

    python -m benchmarks.run --suite cpu      measure; rows go to results/<machine>/; `--list --suite all` names the suites
    python -m benchmarks.plot                 draw the committed rows
    python -m benchmarks.report               write README's tables and the machines' pages from the committed rows
    python -m benchmarks.facts                write README's table of what each library can do, from docs/facts.json
    python -m benchmarks.compare A B          two row files or commits; fails if B lost speed or memory beyond the noise
    python -m benchmarks.gpu                  all that only a GPU can show, in one call
"""
