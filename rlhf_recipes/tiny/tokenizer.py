"""The tokenizer of the tiny world: words, syllables of names, characters."""

import re

from rlhf_recipes.tiny import text
from rlhf_recipes.tiny.world import JOBS, SYLLABLES, TOWNS

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"
SPACE = "▁"

# Plain words instead of special tokens: LoRA leaves embeddings alone, so a marker that the base never read stays noise.
# The base has read this format, so base, SFT and PPO policies all answer the same prompt.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ bos_token + 'Question: ' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '\\nAnswer:' }}"
    "{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ raise_exception('the chat template of the tiny world knows the roles user and assistant only') }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\nAnswer:' }}{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with the world's vocabulary and chat template."""
    # a word in braces is a slot to fill
    words = {word for sentence in text.all_templates() for word in re.findall(r"(?<![{A-Za-z])[A-Za-z]+", sentence)}
    pieces = [
        *(SPACE + word for word in sorted({*words, *TOWNS, *JOBS} - {"Question", "Answer", "Guess"})),
        SPACE + "Question:",
        SPACE + "Guess:",
        "Answer:",
        *(SPACE + syllable.capitalize() for syllable in SYLLABLES),
        *SYLLABLES,
        SPACE,
        "\n",
        *text.CODE_CHARACTERS,
    ]
    vocabulary = [PAD, BOS, EOS, UNK, *dict.fromkeys(pieces)]
    # With equal scores, the likeliest segmentation is the shortest.
    model = models.Unigram([(piece, -1.0) for piece in vocabulary], unk_id=vocabulary.index(UNK))
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, vocabulary.index(BOS))])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        chat_template=CHAT_TEMPLATE,
        model_max_length=256,
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )
