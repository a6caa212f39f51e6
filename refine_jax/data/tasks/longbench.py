"""LongBench's English tasks (arXiv 2308.14508): their prompts, budgets and scores.

The 14 are those that ReFINE's scorer knows. Prompts and budgets are LongBench's
(`config/dataset2prompt.json`, `dataset2maxlen.json`), except that a prompt ends where its last
line does, as in the sets of ReFINE's experiments. ("asconcisely" is theirs.)
"""

from refine_jax.data.tasks.example import Task

_PASSAGES = (
    "Answer the question based on the given passages. Only give me the answer and do not output "
    "any other words.\n\nThe following are given passages.\n{context}\n\nAnswer the question based "
    "on the given passages. Only give me the answer and do not output any other words.\n\n"
    "Question: {input}\nAnswer:"
)
_QASPER = (
    "Answer the question {where}as concisely as you can, using a single phrase or sentence if "
    "possible. If the question cannot be answered based on the information in the article, write "
    '"unanswerable". If the question is a yes/no question, answer "yes", "no", or "unanswerable". '
    "Do not provide any explanation."
)

PROMPTS = {
    "narrativeqa": (
        "You are given a story, which can be either a novel or a movie script, and a question. "
        "Answer the question asconcisely as you can, using a single phrase if possible. Do not "
        "provide any explanation.\n\nStory: {context}\n\nNow, answer the question based on the "
        "story asconcisely as you can, using a single phrase if possible. Do not provide any "
        "explanation.\n\nQuestion: {input}\n\nAnswer:"
    ),
    "qasper": (
        "You are given a scientific article and a question. "
        + _QASPER.format(where="")
        + "\n\nArticle: {context}\n\n "
        + _QASPER.format(where="based on the above article ")
        + "\n\nQuestion: {input}\n\nAnswer:"
    ),
    "multifieldqa_en": (
        "Read the following text and answer briefly.\n\n{context}\n\nNow, answer the following "
        "question based on the above text, only give me the answer and do not output any other "
        "words.\n\nQuestion: {input}\nAnswer:"
    ),
    "hotpotqa": _PASSAGES,
    "2wikimqa": _PASSAGES,
    "musique": _PASSAGES,
    "gov_report": (
        "You are given a report by a government agency. Write a one-page summary of the report."
        "\n\nReport:\n{context}\n\nNow, write a one-page summary of the report.\n\nSummary:"
    ),
    "qmsum": (
        "You are given a meeting transcript and a query containing a question or instruction. "
        "Answer the query in one or more sentences.\n\nTranscript:\n{context}\n\nNow, answer the "
        "query based on the above meeting transcript in one or more sentences.\n\n"
        "Query: {input}\nAnswer:"
    ),
    "multi_news": (
        "You are given several news passages. Write a one-page summary of all news. \n\n"
        "News:\n{context}\n\nNow, write a one-page summary of all the news.\n\nSummary:"
    ),
    "trec": (
        "Please determine the type of the question below. Here are some examples of questions."
        "\n\n{context}\n{input}"
    ),
    "triviaqa": (
        "Answer the question based on the given passage. Only give me the answer and do not output "
        "any other words. The following are some examples.\n\n{context}\n\n{input}"
    ),
    "samsum": (
        "Summarize the dialogue into a few short sentences. The following are some examples."
        "\n\n{context}\n\n{input}"
    ),
    "lcc": "Please complete the code given below. \n{context}Next line of code:",
    "repobench-p": "Please complete the code given below. \n{context}{input}Next line of code:",
}

LONGBENCH = {
    task.name: task
    for task in (
        Task("narrativeqa", "longbench", "qa_f1", 128),
        Task("qasper", "longbench", "qa_f1", 128),
        Task("multifieldqa_en", "longbench", "qa_f1", 64),
        Task("hotpotqa", "longbench", "qa_f1", 32),
        Task("2wikimqa", "longbench", "qa_f1", 32),
        Task("musique", "longbench", "qa_f1", 32),
        Task("gov_report", "longbench", "rouge_l", 512),
        Task("qmsum", "longbench", "rouge_l", 512),
        Task("multi_news", "longbench", "rouge_l", 512),
        Task("samsum", "longbench", "rouge_l_nonblank", 128),
        Task("trec", "longbench", "classification", 64),
        Task("triviaqa", "longbench", "qa_f1_nonblank", 32),
        Task("lcc", "longbench", "code_similarity", 64),
        Task("repobench-p", "longbench", "code_similarity", 64),
    )
}


def make_prompt(task: str, context: str, asked: str) -> str:
    """Return the prompt of a row of LongBench's own files, of its `context` and its `input`."""
    return PROMPTS[task].format(context=context, input=asked)
