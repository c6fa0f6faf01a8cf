"""Why does a mixture gain little, or much, in translation? One thing is changed at a time.

    KERAS_BACKEND=jax python studies/translation_causes.py
    KERAS_BACKEND=jax python studies/translation_causes.py --dataset libreoffice_help --reverse
    KERAS_BACKEND=jax python studies/translation_causes.py --changes none "32 experts"

Trains the translators of `translation.py` for one epoch: the mixture of that study, and others
that differ from it in one thing, such as the number of experts or the weight of the balance loss.
Each is compared in validation loss with the dense model of the same active size and seed.
"""

import datasets
import keras
import resuming
import translation
from command_line import parser_of
from comparisons import each_run, interval, print_runs
from files import claim
from translation import Setting

EPOCHS = 1
CHANGES = {
    "none": Setting(),
    "32 experts": Setting(experts=32),
    "64 experts": Setting(experts=64),
    "32 narrow experts, 8 active": Setting(experts=32, top_k=8),
    "balance 0.001": Setting(balance=0.001),
    "encoder only": Setting(sides=("encoder",)),
    "decoder only": Setting(sides=("decoder",)),
    "32 experts, decoder only": Setting(experts=32, sides=("decoder",)),
}


def main(arguments=None):
    options = parse_options(arguments)
    claim(options.output)
    loss_of = trained(options)

    def losses_of(name, seed):
        setting = CHANGES[name]
        return {
            "dense": loss_of(setting, seed, sparse=False),
            "mixture": loss_of(setting, seed, sparse=True),
        }

    for results in each_run(options, options.changes, losses_of):
        print_losses(results)
    return results


def parse_options(arguments):
    output = "output_translation_causes"
    parser = parser_of(__doc__, output, datasets.PAIRS, seeds=[0, 1, 2])
    parser.add_argument("--reverse", action="store_true", help="into the source language")
    parser.add_argument(
        "--changes", nargs="+", choices=CHANGES, default=[*CHANGES], metavar="NAME",
        help="; ".join(CHANGES),
    )  # fmt: skip
    return parser.parse_args(arguments)


def trained(options):
    """A function of a setting, a seed and a kind of model that returns the validation loss."""
    size = translation.SMOKE if options.smoke else translation.FULL
    subwords, (pairs, validation, _) = translation.load_data(
        options.dataset, options, size, options.reverse
    )
    batches, validation = (
        translation.batches_of(subwords, split, size) for split in (pairs, validation)
    )
    name = resuming.digest(size, options.dataset, options.reverse, EPOCHS)

    def loss(setting, seed, sparse):
        if not sparse:
            setting = Setting()  # Dense models do not differ.

        def train(progress):
            resuming.say(f"{'mixture' if sparse else 'dense'}, seed {seed}, {setting}")
            keras.utils.set_random_seed(seed)
            model = translation.build_model(setting, batches, len(subwords), size, sparse)
            translation.compile_for_training(model, EPOCHS * len(batches))
            history = translation.fit(model, batches, validation, EPOCHS, progress)
            return history["val_loss"][-1]

        folder = options.output / "runs" / name / resuming.digest(setting, seed, sparse)
        return resuming.once(folder, train)

    return loss


def print_losses(results):
    """Differences are those of runs with one seed; after +-, half-width of the 95% interval."""
    columns = {
        "seeds": (lambda losses: str(len(losses)), "mixture"),
        "mixture": ("{:.4f}", "mixture"),
        "dense": ("{:.4f}", "dense"),
        "difference": (interval, lambda run: run["mixture"] - run["dense"]),
    }
    print_runs("change", {name: [*runs.values()] for name, runs in results.items()}, columns)


if __name__ == "__main__":
    main()
