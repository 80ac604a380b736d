"""`python -m diagonal.evaluate.bench`."""

from diagonal.evaluate.bench.bench import main

if __name__ == "__main__":
    main()
