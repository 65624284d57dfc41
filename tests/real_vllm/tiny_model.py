"""Write a tiny Llama with random weights that vLLM can serve: `tiny_model.py DIRECTORY`; needs no network.

Runs under the interpreter that has vLLM. The same bytes come out every time.
"""

import random
import string
import sys

CHAT_TEMPLATE = (
    "{{ bos_token }}{%- for m in messages -%}"
    "{%- if m['content'] is string -%}{%- set c = m['content'] -%}"
    "{%- else -%}{%- set c = m['content'] | map(attribute='text') | join('') -%}{%- endif -%}"
    "<|{{ m['role'] }}|>{{ c }}<|end|>{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]


def sentences(count=4000):
    """Yield made-up words with the frequencies of a language, for the tokenizer to learn from."""
    rng = random.Random(0)
    vowels = "aeiou"
    consonants = [c for c in string.ascii_lowercase if c not in vowels]
    words = [
        "".join(rng.choice(consonants) + rng.choice(vowels) for _ in range(rng.randint(1, 4)))
        for _ in range(1500)
    ]
    weights = [1.0 / (i + 1) for i in range(len(words))]
    for _ in range(count):
        yield " ".join(rng.choices(words, weights, k=rng.randint(4, 16))) + "."


def tokenizer(vocabulary=2048):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    bpe.train_from_iterator(sentences(), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def main(folder):
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    words = tokenizer()
    ids = {
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
    }
    # vLLM's attention on a CPU wants heads of a multiple of 32.
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        torch_dtype="bfloat16",
        **ids,
    )
    torch.manual_seed(0)
    words.save_pretrained(folder)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, safe_serialization=True)
    GenerationConfig(**ids).save_pretrained(folder)


if __name__ == "__main__":
    main(sys.argv[1])
