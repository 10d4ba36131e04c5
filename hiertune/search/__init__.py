"""Worker groups, Ray Tune, Optuna and the ledger. The only part of hiertune that imports Ray."""
