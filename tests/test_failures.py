"""Failures: what providers and gateways really answer when they refuse, and what chatnest makes of it.

Bodies are in the providers' own words; the thread, page or file that quotes one is named beside it.
"""

from __future__ import annotations

import json
import time
import unicodedata

import pytest
from freezegun import freeze_time
from hypothesis import example, given
from hypothesis import strategies as st

from chatnest.errors import (
    ContextLengthExceeded,
    UpstreamBroken,
    UpstreamError,
    UpstreamMisconfigured,
    UpstreamRateLimited,
    UpstreamRejected,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from chatnest.provider.failures import LOGGED_CHARACTERS, Failure, printable, refused, said

from .test_imports import PACKAGE, imported

REFUSALS: dict[tuple[type[UpstreamError], str], list[tuple[str, int, str]]] = {
    (UpstreamMisconfigured, "quota used up"): [
        (
            "OpenAI, langchainjs#1929",
            429,
            '{"error": {"message": "You exceeded your current quota, please check your plan and billing details.",'
            ' "type": "insufficient_quota", "param": null, "code": "insufficient_quota"}}',
        ),
        (
            "OpenAI, requests a day",
            429,
            '{"error":{"message":"Rate limit reached for gpt-4 in organization org-x on requests per day (RPD): Limit'
            " 200, Used 200, Requested 1. Please try again in"
            ' 7m12s.","type":"requests","code":"rate_limit_exceeded"}}',
        ),
        (
            "DeepSeek, continue#10121 and api-docs.deepseek.com/quick_start/error_codes",
            402,
            '{"error":{"message":"Insufficient'
            ' Balance","type":"unknown_error","param":null,"code":"invalid_request_error"}}',
        ),
        (
            "OpenRouter, free-claude-code#772",
            402,
            '{"error":{"message":"Insufficient credits. This account never purchased credits. Make sure your key is'
            " on the correct account or org, and if so, purchase more at"
            ' https://openrouter.ai/settings/credits","code":402}}',
        ),
        (
            "OpenRouter, Roo-Code#515",
            403,
            '{"error":{"message":"Key limit exceeded. Manage it using https://openrouter.ai/keys","code":403}}',
        ),
        (
            "OpenRouter, free models",
            429,
            '{"error":{"message":"Rate limit exceeded: free-models-per-day. Add 10 credits to unlock 1000 free model'
            ' requests per day","code":429}}',
        ),
        (
            "Anthropic",
            400,
            '{"type":"error","error":{"type":"invalid_request_error","message":"Your credit balance is too low to'
            ' access the Anthropic API. Please go to Plans & Billing to upgrade or purchase credits."}}',
        ),
        (
            "xAI, a JSON string, continue#10373",
            429,
            '"Your team 16f2151a has either used all available credits or reached its monthly spending limit. To'
            ' continue making API requests, please purchase more credits or raise your spending limit."',
        ),
        (
            "xAI, agenc-core PR 2483",
            403,
            '{"code":"personal-team-blocked:spending-limit","error":"You have run out of credits or need a Grok'
            ' subscription."}',
        ),
        (
            "Gemini, a day's requests",
            429,
            '[{"error":{"code":429,"message":"You exceeded your current quota, please check your plan and billing'
            " details.\\nPlease retry in"
            ' 18.2s.","status":"RESOURCE_EXHAUSTED",'
            '"details":[{"@type":"type.googleapis.com/google.rpc.QuotaFailure",'
            '"violations":[{"quotaId":"GenerateRequestsPerDayPerProjectPerModel-FreeTier"}]}]}}]',
        ),
        (
            "Gemini, none for this model, its body within a message, continue#12643",
            429,
            json.dumps(
                {
                    "error": {
                        "message": '{"error": {"code": 429, "message": "You exceeded your current quota, please check'
                        " your plan and billing details. \\n* Quota exceeded for metric:"
                        " generativelanguage.googleapis.com/generate_content_free_tier_requests, limit: 0,"
                        ' model: gemini-3.1-pro\\nPlease retry in 11.665902715s.", "status":'
                        ' "RESOURCE_EXHAUSTED"}}',
                        "code": 429,
                    }
                }
            ),
        ),
        (
            "LiteLLM, litellm/proxy/auth/auth_exception_handler.py",
            429,
            '{"error":{"message":"Budget has been exceeded! Current cost: 26.075, Max budget:'
            ' 0.25","type":"budget_exceeded","param":null,"code":"429"}}',
        ),
        (
            "Alibaba Cloud, help.aliyun.com/zh/model-studio/error-code#overdue-payment",
            400,
            '{"error":{"message":"Access denied, please make sure your account is in good'
            ' standing.","type":"Arrearage","param":null,"code":"Arrearage"}}',
        ),
        (
            "Moonshot",
            429,
            '{"error":{"message":"Your account is suspended due to insufficient balance, please recharge your account'
            ' or check your plan and billing details","type":"exceeded_current_quota_error"}}',
        ),
        (
            "Hugging Face",
            402,
            '{"error":"You have exceeded your monthly included credits for Inference Providers. Subscribe to PRO to'
            ' get 20x more monthly included credits."}',
        ),
        ("Zhipu", 429, '{"error":{"code":"1113","message":"余额不足或无可用资源包,请充值。"}}'),
    ],
    (UpstreamRateLimited, "rate limit"): [
        (
            "OpenAI, help.openai.com",
            429,
            '{"error":{"message":"Rate limit reached for gpt-4o-mini in organization org-x on tokens per min (TPM):'
            " Limit 200000, Used 199000, Requested 2000. Please try again in"
            ' 300ms.","type":"tokens","param":null,"code":"rate_limit_exceeded"}}',
        ),
        (
            "Azure",
            429,
            '{"error":{"code":"429","message":"Requests to the ChatCompletions_Create Operation under Azure OpenAI'
            " API version 2024-02-15-preview have exceeded token rate limit of your current OpenAI S0 pricing tier."
            ' Please retry after 26 seconds. Please go here: https://aka.ms/oai/quotaincrease"}}',
        ),
        (
            "Gemini, a minute's requests in the words of a quota",
            429,
            '[{"error":{"code":429,"message":"You exceeded your current quota, please check your plan and billing'
            " details.\\n* Quota exceeded for metric:"
            " generativelanguage.googleapis.com/generate_content_free_tier_requests, limit: 10, model:"
            " gemini-3-flash\\nPlease retry in"
            ' 33.5s.","status":"RESOURCE_EXHAUSTED",'
            '"details":[{"violations":[{"quotaId":"GenerateRequestsPerMinutePerProjectPerModel-FreeTier"}]}]}}]',
        ),
        (
            "Mistral",
            429,
            '{"object":"error","message":"Service tier capacity exceeded for this'
            ' model.","type":"invalid_request_error","param":null,"code":null}',
        ),
        (
            "Groq, eliza#4040",
            429,
            '{"error":{"message":"Rate limit reached for model `llama-3.1-8b-instant` in organization `org_x` service'
            " tier `on_demand` on tokens per minute (TPM): Limit 6000, Used 5034, Requested 1443. Please try again in"
            " 4.77s. Need more tokens? Upgrade to Dev Tier today at"
            ' https://console.groq.com/settings/billing","type":"tokens","code":"rate_limit_exceeded"}}',
        ),
        (
            "Bedrock, whose throttle sounds like a long prompt",
            429,
            '{"message":"Too many tokens, please wait before trying again."}',
        ),
        ("Groq's flex tier, console.groq.com/docs/errors", 498, ""),
        ("nginx", 429, "<html><h1>429 Too Many Requests</h1></html>"),
    ],
    (ContextLengthExceeded, "conversation too long"): [
        (
            "OpenAI, crewAI-examples#121",
            400,
            '{"error":{"message":"This model\'s maximum context length is 8192 tokens. However, your messages'
            " resulted in 8227 tokens. Please reduce the length of the"
            ' messages.","type":"invalid_request_error","param":"messages","code":"context_length_exceeded"}}',
        ),
        (
            "OpenAI, one message of a megabyte",
            400,
            '{"error":{"message":"Invalid \'messages[0].content\': string too long. Expected a string with maximum'
            " length 1048576, but got a string with length 1540820"
            ' instead.","type":"invalid_request_error","param":"messages[0].content",'
            '"code":"string_above_max_length"}}',
        ),
        (
            "OpenAI, a request above a minute's tokens, vanna-flask#11: waiting does not help",
            429,
            '{"error":{"message":"Request too large for gpt-4o on tokens per min (TPM): Limit 30000, Requested'
            " 342389. The input or output tokens must be reduced in order to run"
            ' successfully.","type":"tokens","code":"rate_limit_exceeded"}}',
        ),
        (
            "Groq, ha-groq-cloud-api#27",
            413,
            '{"error": {"message": "Request too large for model llama-3.1-8b-instant in organization org_x service'
            " tier on_demand on tokens per minute (TPM): Limit 6000, Requested 12328, please reduce your message size"
            ' and try again.", "type": "tokens", "code": "rate_limit_exceeded"}}',
        ),
        (
            "Groq, amurex-backend#51",
            400,
            '{"error": {"message": "Please reduce the length of the messages or completion.", "type":'
            ' "invalid_request_error", "param": "messages", "code": "context_length_exceeded"}}',
        ),
        (
            "vLLM",
            400,
            "{\"error\":{\"message\":\"'max_tokens' or 'max_completion_tokens' is too large: 8000. This model's maximum"
            ' context length is 4096 tokens and your request has 2778 input tokens (8000 > 4096 - 2778). None",'
            '"type":"BadRequestError","param":null,"code":400}}',
        ),
        (
            "llama.cpp, tools/server/server-common.cpp",
            400,
            '{"error":{"code":400,"message":"request (25837 tokens) exceeds the available context size (25088'
            ' tokens), try increasing it","type":"exceed_context_size_error","n_prompt_tokens":25837,"n_ctx":25088}}',
        ),
        (
            "ik_llama.cpp before PR 2420",
            500,
            '{"error":{"code":500,"message":"the request exceeds the available context size, try increasing it",'
            '"type":"server_error"}}',
        ),
        (
            "LiteLLM, litellm/exceptions.py",
            400,
            '{"error":{"message":"litellm.ContextWindowExceededError: litellm.BadRequestError: OpenAIException -'
            ' Error code: 400. Received Model Group=gpt-4o","type":null,"param":null,"code":"400"}}',
        ),
        (
            "Mistral",
            400,
            '{"object":"error","message":"Prompt contains 300000 tokens and 0 draft tokens, too large for model with'
            ' 131072 maximum context length","type":"invalid_request_error","code":3051}',
        ),
        (
            "OpenRouter, the provider's own body in metadata",
            400,
            json.dumps(
                {
                    "error": {
                        "message": "Provider returned error",
                        "code": 400,
                        "metadata": {
                            "raw": '{"error": {"message": "Your input exceeds the context window of this model."}}',
                            "provider_name": "OpenAI",
                        },
                    }
                }
            ),
        ),
        (
            "Gemini",
            400,
            '[{"error":{"code":400,"message":"The input token count (1196265) exceeds the maximum number of tokens'
            ' allowed (1048575).","status":"INVALID_ARGUMENT"}}]',
        ),
        (
            "Anthropic, Roo-Code#5816",
            400,
            '{"type":"error","error":{"type":"invalid_request_error","message":"prompt is too long: 208732 tokens >'
            ' 200000 maximum"}}',
        ),
        (
            "Anthropic, continue#8454",
            400,
            '{"type":"error","error":{"type":"invalid_request_error","message":"input length and `max_tokens` exceed'
            ' context limit: 143653 + 64000 > 200000, decrease input length or `max_tokens` and try again"}}',
        ),
        (
            "text-generation-inference, UI-TARS-desktop#626",
            422,
            '{"error":"Input validation error: `inputs` tokens + `max_new_tokens` must be <= 65537. Given: 79993'
            ' `inputs` tokens and 1024 `max_new_tokens`","error_type":"validation"}',
        ),
        (
            "Together, SGLang",
            400,
            '{"error":{"message":"The input (265330 tokens) is longer than the model\'s context length (262144'
            ' tokens).","type":"invalid_request_error"}}',
        ),
        (
            "xAI, cline#3120",
            400,
            '"This model\'s maximum prompt length is 131072 but the request contains 136973 tokens."',
        ),
        (
            "Moonshot",
            400,
            '{"error":{"message":"Invalid request: Your request exceeded model token limit: 262144 (requested:'
            ' 300000)","type":"invalid_request_error"}}',
        ),
        (
            "Alibaba Cloud",
            400,
            '{"error":{"code":"InvalidParameter","message":"Range of input length should be [1, 129024]"}}',
        ),
        (
            "Ollama",
            400,
            '{"error":{"message":"prompt too long; exceeded max context length by 4096 tokens","type":"api_error"}}',
        ),
        (
            "GitHub Models, freellmapi#426",
            413,
            '{"error":{"code":"tokens_limit_reached","message":"Request body too large for gpt-4.1 model. Max size:'
            ' 8000 tokens."}}',
        ),
        ("nginx, client_max_body_size", 413, "<html><head><title>413 Request Entity Too Large</title></head></html>"),
    ],
    (UpstreamMisconfigured, "wrong key"): [
        (
            "OpenAI",
            401,
            '{"error":{"message":"Incorrect API key provided: sk-proj-****abcd. You can find your API key at'
            ' https://platform.openai.com/account/api-keys.","type":"invalid_request_error","code":"invalid_api_key"}}',
        ),
        (
            "Azure",
            401,
            '{"error":{"code":"401","message":"Access denied due to invalid subscription key or wrong API endpoint."}}',
        ),
        ("vLLM, server_utils.py", 401, '{"error": "Unauthorized"}'),
        (
            "Gemini, openai-scala-client#109",
            400,
            '[{"error":{"code":400,"message":"API key not valid. Please pass a valid API'
            ' key.","status":"INVALID_ARGUMENT",'
            '"details":[{"@type":"type.googleapis.com/google.rpc.ErrorInfo","reason":"API_KEY_INVALID"}]}}]',
        ),
        (
            "LiteLLM, litellm/proxy/_types.py",
            400,
            '{"error":{"message":"Authentication Error, Invalid proxy server token'
            ' passed.","type":"token_not_found_in_db","param":"key","code":"400"}}',
        ),
    ],
    (UpstreamMisconfigured, "not permitted"): [
        (
            "OpenAI",
            403,
            '{"error":{"code":"unsupported_country_region_territory","message":"Country, region, or territory not'
            ' supported","param":null,"type":"request_forbidden"}}',
        ),
        (
            "Gemini",
            400,
            '[{"error":{"code":400,"message":"User location is not supported for the API use.",'
            '"status":"FAILED_PRECONDITION"}}]',
        ),
        ("a proxy's own 403", 403, "<html><h1>403 Forbidden</h1></html>"),
    ],
    (UpstreamMisconfigured, "unknown model"): [
        (
            "OpenAI",
            404,
            '{"error":{"message":"The model `gpt-9` does not exist or you do not have access to it.",'
            '"type":"invalid_request_error","param":null,"code":"model_not_found"}}',
        ),
        (
            "Azure, chatbox#646",
            404,
            '{"error":{"code":"DeploymentNotFound","message":"The API deployment for this resource does not exist. If'
            ' you created the deployment within the last 5 minutes, please wait a moment and try again."}}',
        ),
        (
            "Azure, a model without chat completions",
            400,
            '{"error":{"code":"OperationNotSupported","message":"The chatCompletion operation does not work with the'
            ' specified model, o3-pro. Please choose different model and try again."}}',
        ),
        (
            "OpenRouter, openrouter-examples#74",
            400,
            '{"error": {"message": "claude-sonnet-4-6 is not a valid model ID", "code": 400}}',
        ),
        (
            "OpenRouter",
            404,
            '{"error":{"message":"No endpoints found for tngtech/deepseek-r1t2-chimera:free.","code":404}}',
        ),
        (
            "LiteLLM, litellm/proxy/route_llm_request.py",
            400,
            '{"error":{"message":"{\'error\': \'/chat/completions: Invalid model name passed in model=gpt-9. Call'
            ' `/v1/models` to view available models for your key.\'}","type":"None","param":"None","code":"400"}}',
        ),
        (
            "DeepSeek",
            400,
            '{"error":{"message":"Model Not Exist","type":"invalid_request_error","param":null,'
            '"code":"invalid_request_error"}}',
        ),
        (
            "Groq",
            400,
            '{"error":{"message":"The model `llama3-8b-8192` has been decommissioned and is no longer supported.'
            " Please refer to"
            ' https://console.groq.com/docs/deprecations","type":"invalid_request_error",'
            '"code":"model_decommissioned"}}',
        ),
        (
            "Mistral",
            400,
            '{"object":"error","message":"Invalid model: mistral-9","type":"invalid_model","param":null,"code":"1500"}',
        ),
        (
            "Ollama, server/routes.go",
            404,
            '{"error":{"message":"model \\"llama9\\" not found, try pulling it first","type":"not_found_error"}}',
        ),
        (
            "new-api",
            503,
            '{"error":{"message":"当前分组 default 下对于模型 gpt-9'
            ' 无可用渠道","type":"new_api_error","code":"model_not_found"}}',
        ),
        ("an address without /v1", 404, "404 page not found"),
    ],
    (UpstreamMisconfigured, "wrong address"): [
        ("an address that answers GET only", 405, '{"detail":"Method Not Allowed"}'),
        ("http instead of https", 301, "<h1>301 Moved Permanently</h1>"),
    ],
    (UpstreamMisconfigured, "unsupported parameter"): [
        (
            "OpenAI",
            400,
            '{"error":{"message":"Unsupported parameter: \'max_tokens\' is not supported with this model. Use'
            ' \'max_completion_tokens\' instead.","type":"invalid_request_error","param":"max_tokens",'
            '"code":"unsupported_parameter"}}',
        ),
        (
            "OpenAI",
            400,
            '{"error":{"message":"Unsupported value: \'temperature\' does not support 0.7 with this model. Only the'
            " default (1) value is"
            ' supported.","type":"invalid_request_error","param":"temperature","code":"unsupported_value"}}',
        ),
        (
            "OpenAI",
            400,
            '{"error":{"message":"max_tokens is too large: 5000. This model supports at most 4096 completion tokens,'
            " whereas you provided"
            ' 5000.","type":"invalid_request_error","param":"max_tokens","code":"invalid_value"}}',
        ),
        (
            "Anthropic",
            400,
            '{"type":"error","error":{"type":"invalid_request_error","message":"`temperature` is deprecated for this'
            ' model."}}',
        ),
        (
            "text-generation-inference, transformers#28523",
            422,
            '{"error":"Input validation error: `max_new_tokens` must be <= 192. Given: 200","error_type":"validation"}',
        ),
        (
            "Mistral, crewAI#60",
            422,
            '{"object":"error","message":{"detail":[{"type":"extra_forbidden","loc":["body","n"],"msg":"Extra inputs'
            ' are not permitted","input":1}]},"type":"invalid_request_error","param":null,"code":null}',
        ),
        (
            "Azure, chatbox#1745",
            400,
            '{"error":{"code":"BadRequest","message":"Model o1 is enabled only for api versions 2024-12-01-preview and'
            ' later"}}',
        ),
        ("Azure, mindshub#11563", 400, '{"error":{"code":"BadRequest","message":"API version not supported"}}'),
    ],
    (UpstreamRejected, "content policy"): [
        (
            "Azure",
            400,
            '{"error":{"message":"The response was filtered due to the prompt triggering Azure OpenAI\'s content'
            " management policy. Please modify your prompt and"
            ' retry.","param":"prompt","code":"content_filter","status":400,'
            '"innererror":{"code":"ResponsibleAIPolicyViolation",'
            '"content_filter_result":{"hate":{"filtered":true}}}}}',
        ),
        (
            "OpenRouter, openrouter.ai/docs/api/reference/errors-and-debugging",
            403,
            '{"error":{"code":403,"message":"Input was'
            ' flagged","metadata":{"reasons":["violence"],"flagged_input":"my quota exceeded; the model does not'
            ' exist","provider_name":"OpenAI"}}}',
        ),
        (
            "DeepSeek",
            400,
            '{"error":{"message":"Content Exists Risk","type":"invalid_request_error","code":"invalid_request_error"}}',
        ),
    ],
    (UpstreamRejected, "refused"): [
        (
            "a strict chat template on vLLM",
            400,
            '{"error":{"message":"Conversation roles must alternate user/assistant/user/assistant/... None",'
            '"type":"BadRequestError","param":null,"code":400}}',
        ),
        (
            "OpenAI",
            400,
            '{"error":{"message":"Invalid value for \'content\': expected a string, got null.",'
            '"type":"invalid_request_error","param":"messages.[1].content","code":null}}',
        ),
        ("nothing said", 400, ""),
        ("a status nobody knows", 418, "I'm a teapot"),
    ],
    (UpstreamUnavailable, "unavailable"): [
        (
            "OpenAI",
            503,
            '{"error":{"message":"The engine is currently overloaded, please try again later","type":"server_error"}}',
        ),
        ("Anthropic", 529, '{"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}'),
        ("nginx", 502, "<html><title>502 Bad Gateway</title></html>"),
        ("nothing said", 500, ""),
        ("a conflict", 409, ""),
        ("too early", 425, ""),
    ],
}

TIMEOUTS = [
    ("nginx", 504, "<html><head><title>504 Gateway Time-out</title></head></html>"),
    ("Cloudflare", 524, "<html><head><title>api.example.com | 524: A timeout occurred</title></head></html>"),
    ("Cloudflare", 522, "error code: 522"),
    ("Azure's gateway", 408, '{"error":{"code":"Timeout","message":"The operation was timeout."}}'),
    ("nginx, whose client left", 499, ""),
    ("LiteLLM", 500, '{"error":{"message":"litellm.Timeout: Connection timed out after None seconds.","code":"500"}}'),
    ("a relay that says 400", 400, '{"error":{"message":"Upstream request timed out","type":"upstream_error"}}'),
    ("Gemini", 503, '[{"error":{"code":503,"message":"Deadline exceeded","status":"UNAVAILABLE"}}]'),
]


each_refusal = pytest.mark.parametrize(
    ("kind", "cause", "status", "body"),
    [
        pytest.param(kind, cause, status, body, id=f"{cause}-{status}-{source}")
        for (kind, cause), refusals in REFUSALS.items()
        for source, status, body in refusals
    ],
)


@each_refusal
def test_a_refusal_is_what_its_provider_means(kind: type[UpstreamError], cause: str, status: int, body: str) -> None:
    failure = refused(status, {}, body.encode(), seconds=5.0)
    assert (type(failure.error), failure.cause) == (kind, cause)
    assert not failure.error.billed
    assert failure.retry == (kind in (UpstreamRateLimited, UpstreamUnavailable))
    assert not failure.stream_options_refused


@each_refusal
def test_a_server_that_had_time_to_work_may_have_billed(
    kind: type[UpstreamError], cause: str, status: int, body: str
) -> None:
    failure = refused(status, {}, body, seconds=5.1)
    assert (type(failure.error), failure.cause) == (kind, cause)
    assert failure.error.billed == (status >= 500)
    assert failure.retry == (kind in (UpstreamRateLimited, UpstreamUnavailable) and status < 500)


@pytest.mark.parametrize(
    ("cause", "codes"),
    [
        (
            "quota used up",
            "402 insufficient_quota billing_not_active billing_error Arrearage exceeded_current_quota_error"
            " budget_exceeded credit_balance_exhausted",
        ),
        (
            "conversation too long",
            "413 context_length_exceeded exceed_context_size_error context_exceeded request_too_large"
            " tokens_limit_reached",
        ),
        (
            "content policy",
            "content_filter ResponsibleAIPolicyViolation data_inspection_failed DataInspectionFailed sensitive",
        ),
        (
            "wrong key",
            "401 invalid_api_key authentication_error invalid_authentication_error auth_error token_not_found_in_db"
            " expired_key API_KEY_INVALID Unauthorized UNAUTHENTICATED",
        ),
        (
            "unknown model",
            "404 model_not_found model_decommissioned model_not_available model_not_supported DeploymentNotFound"
            " OperationNotSupported",
        ),
        (
            "not permitted",
            "unsupported_country_region_territory model_terms_required PERMISSION_DENIED permission_error",
        ),
        (
            "unsupported parameter",
            "unsupported_parameter unknown_parameter unsupported_value extra_forbidden not_supported_error",
        ),
    ],
)
@pytest.mark.parametrize("key", ["code", "type", "status", "reason"])
def test_a_code_goes_before_words(cause: str, codes: str, key: str) -> None:
    """Words may be anybody's; a code is the provider's."""
    other = "rate limit" if cause == "quota used up" else "insufficient balance"
    for code in codes.split():
        error = {"message": f"Upstream error: {other}", key: int(code) if code.isdecimal() else code}
        assert refused(400, {}, json.dumps({"error": error}), seconds=0.2).cause == cause, code


@pytest.mark.parametrize(
    ("cause", "sentences"),
    [
        (
            "quota used up",
            [
                "You exceeded your current quota, please check your plan and billing details.",
                "Insufficient account balance",
                "insufficient_user_quota",
                "用户额度不足, 剩余额度: $0.00",
                "Rate limit of 150 per 86400s exceeded for UserByModelByDay. Please wait 4000 seconds",
                "Rate limit reached on tokens per day (TPD): Limit 100000, Used 99000",
                "Budget has been exceeded! Team=t1 Current cost: 2, Max budget: 1",
                "ExceededBudget: User=u1 over budget. Spend=2, Budget=1",
                "No deployments available - crossed budget",
                "Your credit balance is too low to access the Anthropic API.",
                "This request requires more credits, or fewer max_tokens.",
                "You have run out of credits",
                "Your account is not active, please check your billing details on our website.",
                "The account associated with this API key has been deactivated.",
                "Account x is suspended",
                "Billing hard limit has been reached",
            ],
        ),
        (
            "conversation too long",
            [
                "Please reduce the length of the messages or completion.",
                "please reduce your message size and try again",
                "Requested token count exceeds the model's maximum context length of 131072 tokens.",
                "The number of tokens to keep from the initial prompt is greater than the context length",
                "invalid params, context window exceeds limit",
                "Prompt has 300,000 tokens, but the configured context size is 131,072 tokens",
                "Prompt is 11543 tokens but the model context window is 4096 tokens.",
                "Input tokens exceed the configured limit of 272000 tokens.",
                "Input length 131393 exceeds the maximum allowed input length of 131040 tokens.",
                "prompt token count of 145000 exceeds the limit of 128000",
                "Input validation error: `inputs` must have less than 1024 tokens. Given: 4000",
                "maximum input length is 8000 tokens",
            ],
        ),
        (
            "content policy",
            [
                "The response was filtered due to the prompt triggering Azure OpenAI's content management policy.",
                "litellm.ContentPolicyViolationError: content_policy_violation",
                "Invalid prompt: your prompt was flagged as potentially violating our usage policy.",
                "potentially violating our usage policy",
                "Your request was rejected as a result of our safety system.",
                "Input data may contain inappropriate content.",
                "Your prompt was flagged by the operator",
            ],
        ),
        (
            "wrong key",
            ["Incorrect API key provided: xa***.", "invalid x-api-key", "API key not valid.", "Missing API key"],
        ),
        (
            "unknown model",
            [
                "model_not_found",
                "No endpoints found for x/y:free.",
                "No models loaded. Please load a model in the developer page",
                "Unknown model: gpt-9",
                "models/gemini-0 is not found for API version v1main, or is not supported for generateContent.",
            ],
        ),
        ("not permitted", ["key not allowed to access model. This key can only access models=['a']"]),
        (
            "unsupported parameter",
            [
                "extra fields not permitted",
                "Extra inputs are not permitted",
                "Additional properties are not allowed ('n' was unexpected)",
                "Parameter n is not supported",
                "The api-version query parameter (?api-version=) is required for all requests.",
            ],
        ),
        ("rate limit", ["Too Many Requests", "ThrottlingException: slow down", "temporarily rate-limited upstream"]),
    ],
)
def test_words_alone_tell_too(cause: str, sentences: list[str]) -> None:
    """A gateway drops the code, and answers with a status of its own."""
    for sentence in sentences:
        assert refused(500, {}, sentence, seconds=0.2).cause == cause, sentence
        wrapped = json.dumps({"detail": [{"msg": f"openai.BadRequestError: Error code: 400 - {sentence}"}]})
        assert said(wrapped).cause == cause, sentence


@pytest.mark.parametrize(
    ("statuses", "kind"),
    [
        ((401, 402, 403, 404, 405, 301, 308), UpstreamMisconfigured),
        ((413,), ContextLengthExceeded),
        ((429, 498), UpstreamRateLimited),
        ((409, 425, 500, 501, 502, 503, 520, 521, 529), UpstreamUnavailable),
        ((408, 499, 504, 522, 524, 598, 599), UpstreamTimeout),
        ((400, 406, 410, 415, 418, 422, 451), UpstreamRejected),
        ((100, 201, 202, 204, 999), UpstreamBroken),
    ],
)
def test_a_status_with_no_more_words(statuses: tuple[int, ...], kind: type[UpstreamError]) -> None:
    for status in statuses:
        assert type(refused(status, {}, "", seconds=0.2).error) is kind, status


@pytest.mark.parametrize(("source", "status", "body"), TIMEOUTS)
def test_who_gave_up_waiting_may_have_been_billed(source: str, status: int, body: str) -> None:
    failure = refused(status, {"retry-after": "1", "x-should-retry": "true"}, body, seconds=0.2)
    assert type(failure.error) is UpstreamTimeout
    assert failure.error.billed
    assert not failure.retry


def test_an_answer_that_is_no_stream_may_have_been_billed() -> None:
    failure = refused(202, {"x-should-retry": "true"}, "Accepted", seconds=0.1)
    assert type(failure.error) is UpstreamBroken
    assert failure.error.billed
    assert not failure.retry


# Asking once more without stream_options.


@pytest.mark.parametrize(
    ("source", "status", "body"),
    [
        (
            "openai-agents-python#442",
            422,
            '{"object": "error", "message": {"detail": [{"type": "extra_forbidden", "loc": ["body", "stream_options",'
            ' "include_usage"], "msg": "Extra inputs are not permitted"}]}, "type": "invalid_request_error"}',
        ),
        (
            "Azure AI Foundry through LiteLLM, litellm#11696",
            400,
            '{"error":{"code":"Invalid input","message":"{\\"detail\\":[{\\"type\\":\\"extra_forbidden\\",\\"loc\\":'
            '[\\"body\\",\\"stream_options\\",\\"include_usage\\"],\\"msg\\":\\"Extra inputs are not permitted\\",'
            '\\"input\\":true}]}","status":422}}',
        ),
        (
            "LiteLLM, Python within a message, litellm#3899",
            422,
            "{\"error\": {\"message\": \"OpenAIException - Error code: 422 - {'detail': [{'type': 'extra_forbidden',"
            " 'loc': ['body', 'stream_options'], 'msg': 'Extra inputs are not permitted', 'input': {}}]}\","
            ' "type": null, "param": null, "code": 422}}',
        ),
        (
            "Azure, gpt-pilot#1022",
            400,
            '{"error": {"message": "Unrecognized request argument supplied: stream_options. Please contact us through'
            ' an Azure support request", "type": "invalid_request_error", "param": "", "code": null}}',
        ),
        (
            "new-api#418",
            400,
            '{"error": {"message": "Unknown parameter: \'stream_options\'. (request id: 2024)", "type":'
            ' "invalid_request_error", "param": "stream_options", "code": "unknown_parameter"}}',
        ),
        ("xAI, cline#2764", 400, '{"code":"400","error":"Argument not supported: stream_options"}'),
        (
            "Azure with data sources, semantic-kernel#10510",
            400,
            '{"error": {"requestid": "eea1c96d", "code": 400, "message": "Validation error at #/stream_options: Extra'
            ' inputs are not permitted"}}',
        ),
        (
            "Gemini",
            400,
            '[{"error":{"code":400,"message":"Invalid JSON payload received. Unknown name \\"stream_options\\": Cannot'
            ' find field.","status":"INVALID_ARGUMENT"}}]',
        ),
        ("a Go server", 400, '{"error":"json: unknown field \\"stream_options\\""}'),
        ("vLLM", 400, '{"error":{"message":"stream_options is only allowed when stream is true","code":400}}'),
        ("a Python server", 500, "create() got an unexpected keyword argument 'stream_options'"),
    ],
)
def test_who_does_not_know_stream_options_may_be_asked_without(source: str, status: int, body: str) -> None:
    failure = refused(status, {}, body, seconds=0.2)
    assert failure.stream_options_refused
    assert type(failure.error) is UpstreamMisconfigured  # where it was left out already
    assert not failure.retry


QUOTED = "{'stream_options': {}, 'messages': [{'content': 'insufficient_quota, prompt is too long, timed out'}]}"


@pytest.mark.parametrize(
    "body",
    [
        {
            "detail": [
                {"type": "missing", "loc": ["body", "messages", 0, "role"], "msg": "Field required", "input": QUOTED}
            ]
        },
        {
            "detail": [
                {
                    "loc": ["body", "messages", 0, "role"],
                    "msg": "unexpected value; permitted: 'user'",
                    "input": {
                        "messages": [{"role": "bot", "content": [{"type": "text", "text": "api key not valid"}]}],
                        "stream_options": {"include_usage": True},
                    },
                }
            ]
        },
        {
            "error": {
                "message": f"[{{'type': 'missing', 'loc': ('body', 'messages'), 'msg': 'bad', 'input': {QUOTED}}}]"
            }
        },
        {
            "error": {
                "message": "1 validation error for Request [type=missing, input_value='model not found, rate limit']"
            }
        },
        {
            "error": {
                "message": "bad",
                "metadata": {"flagged_input": "temperature", "raw": json.dumps({"prompt": QUOTED})},
            }
        },
    ],
)
def test_what_a_refusal_quotes_of_the_request_says_nothing(body: dict[str, object]) -> None:
    """FastAPI, vLLM, Pydantic and OpenRouter quote what users wrote."""
    failure = refused(422, {}, json.dumps(body), seconds=0.2)
    assert (type(failure.error), failure.cause) == (UpstreamRejected, "refused")
    assert not failure.stream_options_refused


def test_stream_options_are_not_to_blame_where_something_else_is() -> None:
    body = json.dumps({"error": {"message": "stream_options: rate limit exceeded"}})
    assert not refused(429, {}, body, seconds=0.2).stream_options_refused
    unknown = json.dumps({"error": {"message": "unknown field stream_options"}})
    assert not refused(500, {}, unknown, seconds=6).stream_options_refused  # asking again would be a second bill


# Waiting and asking again.


@freeze_time("2026-11-25 12:00:00")
@pytest.mark.parametrize(
    ("headers", "wait"),
    [
        ({}, None),
        ({"retry-after": "20"}, 20),
        ({"retry-after": " 1.5 "}, 1.5),
        ({"retry-after": "0"}, 0),
        ({"retry-after": "120"}, 120),
        ({"retry-after": "121"}, 121),
        ({"retry-after-ms": "250"}, 0.25),
        ({"retry-after-ms": "250", "retry-after": "1"}, 0.25),
        ({"retry-after-ms": "soon", "retry-after": "3"}, 3),
        ({"retry-after": "Wed, 25 Nov 2026 12:01:00 GMT"}, 60),
        ({"retry-after": "Wed, 25 Nov 2026 11:59:00 GMT"}, None),
        ({"retry-after": "Wed, 25 Nov 2099 12:00:00 GMT"}, 86_400),
        ({"retry-after": "-5"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "٣"}, None),
        ({"retry-after": "tomorrow"}, None),
        ({"retry-after": "Wed, 99 Nov 2026 12:00:00 GMT"}, None),
        ({"retry-after": "9" * 400}, 86_400),
    ],
)
def test_it_waits_as_long_as_the_provider_says(headers: dict[str, str], wait: float | None) -> None:
    failure = refused(429, headers, "", seconds=0.2)
    assert failure.wait == wait
    assert failure.retry == (wait is None or wait <= 120)
    assert failure.error.retry_after == (None if wait is None else max(1, -int(-wait // 1)))


def test_waiting_is_advised_only_where_it_helps() -> None:
    assert refused(503, {"retry-after": "20"}, "", seconds=9).error.retry_after == 20
    assert refused(401, {"retry-after": "20"}, "", seconds=0.2).error.retry_after is None


@pytest.mark.parametrize(
    ("status", "body", "asked", "retry"),
    [
        (429, "", "false", False),
        (503, "", "False", False),
        (400, "", "true", True),
        (503, "", "", True),
        (503, "", "perhaps", True),
        (429, '{"error":{"code":"insufficient_quota"}}', "true", False),
    ],
)
def test_the_provider_may_say_whether_to_ask_again(status: int, body: str, asked: str, retry: bool) -> None:
    assert refused(status, {"x-should-retry": asked}, body, seconds=0.2).retry == retry


# An error within a 200.


@pytest.mark.parametrize(
    ("error", "kind", "cause"),
    [
        ("error", UpstreamBroken, "broken off"),
        ("abort", UpstreamBroken, "broken off"),  # vLLM
        ("network_error", UpstreamBroken, "broken off"),  # Zhipu
        ("insufficient_system_resource", UpstreamBroken, "broken off"),  # DeepSeek
        ("sensitive", UpstreamRejected, "content policy"),  # Zhipu
        ("model_context_window_exceeded", ContextLengthExceeded, "conversation too long"),  # Zhipu
        ({"code": 500, "message": "context shift is disabled", "type": "server_error"}, UpstreamBroken, "broken off"),
        (b'{"code":500,"message":"Context size has been exceeded."}', ContextLengthExceeded, "conversation too long"),
        (
            {"code": "DataInspectionFailed", "message": "Output data may contain inappropriate content."},
            UpstreamRejected,
            "content policy",
        ),
        ({"error": {"message": "All channels are exhausted", "code": 503}}, UpstreamBroken, "broken off"),
        ({"error": {"message": "User not found.", "code": 401}}, UpstreamMisconfigured, "wrong key"),
        (
            {"error": {"message": "This request requires more credits", "code": 402}},
            UpstreamMisconfigured,
            "quota used up",
        ),
        (
            {"object": "error", "message": "The model `x` does not exist.", "code": 404},
            UpstreamMisconfigured,
            "unknown model",
        ),
        ({"error": {"message": "Rate limit exceeded", "code": 429}}, UpstreamBroken, "rate limit"),
        ({"error": {"message": "Gateway Timeout", "code": 504}}, UpstreamBroken, "timed out"),
        (
            {  # openrouter.ai/docs/api/reference/errors-and-debugging
                "id": "gen-1",
                "error": {"code": "server_error", "message": "Provider disconnected unexpectedly"},
                "choices": [{"delta": {"content": "insufficient_quota"}, "finish_reason": "error"}],
            },
            UpstreamBroken,
            "broken off",
        ),
        (  # text-generation-inference, GenAIInfra#487
            '{"error":"Input validation error: `inputs` tokens + `max_new_tokens` must be <='
            ' 2048.","error_type":"validation"}',
            ContextLengthExceeded,
            "conversation too long",
        ),
        (
            {"base_resp": {"status_code": 1008, "status_msg": "insufficient balance"}},
            UpstreamMisconfigured,
            "quota used up",
        ),
        ({"detail": "Invalid API key"}, UpstreamMisconfigured, "wrong key"),
        (b'\xef\xbb\xbf{"error":{"code":401}}', UpstreamMisconfigured, "wrong key"),
        ("<!DOCTYPE html><title>Sign in</title>", UpstreamBroken, "broken off"),
        ("", UpstreamBroken, "broken off"),
        (None, UpstreamBroken, "broken off"),
        (["error"], UpstreamBroken, "broken off"),
    ],
)
def test_an_error_in_a_stream(error: object, kind: type[UpstreamError], cause: str) -> None:
    failure = said(error)
    assert (type(failure.error), failure.cause) == (kind, cause)
    assert failure.error.billed
    assert (failure.retry, failure.wait, failure.stream_options_refused) == (False, None, False)


# The log.


def test_the_providers_words_are_one_line_of_the_log() -> None:
    forged = "no\n2026-11-25 ERROR root: all keys leaked\r\x1b[2J\u2028\u202egnol"
    assert refused(500, {}, forged, seconds=0.2).words == (
        r"no\n2026-11-25 ERROR root: all keys leaked\r\x1b[2J\u2028\u202egnol"
    )
    assert said({"error": {"message": forged}}).words.isprintable()


def test_json_is_logged_compactly() -> None:
    pretty = json.dumps([{"error": {"code": 429, "message": "voilà"}}], indent=2)
    assert refused(429, {}, pretty, seconds=0.2).words == '[{"error": {"code": 429, "message": "voilà"}}]'


@pytest.mark.parametrize(
    ("said_by_provider", "logged"),
    [
        ("bad key sk-proj-abcdefghijklmnopqrstuvwx.", "bad key sk-…"),
        ("got Authorization: Bearer eyJhbGciOiJIUzI1NiJ9.e30.abcdef", "got Authorization: Bearer …"),
        ("bad key sk-proj-************wxyz", "bad key sk-proj-************wxyz"),
        ("Bearer authentication is required", "Bearer authentication is required"),
    ],
)
def test_a_key_that_a_provider_repeats_is_not_logged(said_by_provider: str, logged: str) -> None:
    assert refused(401, {}, said_by_provider, seconds=0.2).words == logged


# Anything at all.

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.text() | st.sampled_from(["error", "message", "code", "loc"]), inner)
    ),
    max_leaves=10,
)
bodies = (
    st.binary() | st.text() | json_values.map(json.dumps) | st.text().map(lambda text: f'{{"error":{{"message":"{text}')
)
wild_headers = st.dictionaries(
    st.sampled_from(["retry-after", "retry-after-ms", "x-should-retry"]),
    st.text()
    | st.floats().map(str)
    | st.integers().map(str)
    | st.datetimes().map("{:%a, %d %b %Y %H:%M:%S GMT}".format),
)


def assert_sound(failure: Failure) -> None:
    assert failure.error.message == type(failure.error).message
    assert len(failure.words) <= LOGGED_CHARACTERS
    assert failure.words.isprintable()
    assert not (failure.retry and failure.error.billed)
    assert failure.wait is None or 0 <= failure.wait <= 86_400


@given(st.integers(100, 999), wild_headers, bodies, st.floats())
@example(503, {"retry-after": "Mon, 01 Jan 0001 00:00:00 +2359"}, b"\xff\xfe", float("nan"))
@example(400, {}, "[" * 100_000, 0.0)
@example(400, {}, '{"a":' * 900 + "1" + "}" * 900, 0.0)
@example(400, {}, '{"code": ' + "9" * 5000 + "}", 0.0)
@example(400, {}, '"\\ud800"', 0.0)
def test_any_refusal_is_a_failure(status: int, headers: dict[str, str], body: bytes | str, seconds: float) -> None:
    failure = refused(status, headers, body, seconds=seconds)
    assert_sound(failure)
    if not failure.error.billed:
        assert 300 <= status < 500 or seconds <= 5


@given(bodies | json_values | st.builds(object) | st.sets(st.integers()))
@example({"error": {"code": 10**5000, "param": 10**5000, "loc": [10**5000], "message": -(10**5000)}})
def test_any_error_in_a_stream_is_a_failure(error: object) -> None:
    failure = said(error)
    assert_sound(failure)
    assert failure.error.billed
    assert not failure.retry


def test_what_is_nested_too_deeply_is_not_followed() -> None:
    error: object = {"code": "invalid_api_key"}
    for _ in range(100_000):  # since 3.13 Python follows 5,000
        error = {"error": error}
    failure = said(error)
    assert (type(failure.error), failure.words) == (UpstreamBroken, "dict")


@given(st.text(st.characters()), st.integers(0, 50))
@example("\x00\x1b\x7f\x85\u2028\u2029\u061c\u200f\u202e\u2069\ud800", 100)
def test_printable_text_holds_nothing_that_acts(text: str, limit: int) -> None:
    shown = printable(text, limit)
    assert len(shown) <= limit
    assert not {unicodedata.category(char) for char in shown} & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    if len(shown) < limit:
        assert shown == "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


@pytest.mark.parametrize(
    "word",
    [
        "exceed",
        "model",
        "maximum ",
        "context length ",
        "account",
        "argument",
        "exceeded your current quota",
        "requests ",
        "location",
        "\x00",
    ],
)
def test_no_body_makes_reading_slow(word: str) -> None:
    started = time.process_time()
    refused(400, {}, word * (200_000 // len(word)), seconds=0.2)
    assert time.process_time() - started < 0.5


def test_the_room_is_pure() -> None:
    names = {name for name in imported(PACKAGE / "provider" / "failures.py") if name.startswith("chatnest")}
    assert {name.rpartition(".")[0] for name in names} == {"chatnest.errors"}
    assert not {"asyncio", "django", "logging"} & {
        name.partition(".")[0] for name in imported(PACKAGE / "provider" / "failures.py")
    }
