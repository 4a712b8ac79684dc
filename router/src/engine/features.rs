//! What the policies are told of a request: no more than they ask for is read.

use http::HeaderMap;

use crate::config::RouterConfig;
use crate::dialect::trtllm::ClientRequest;
use crate::policy::{Features, Policy};
use crate::table::Phase;

/// Headers that name a conversation, the first found counts; the body's `conversation_params` comes before them.
const CONVERSATION_HEADERS: [&str; 2] = ["x-correlation-id", "x-session-id"];

/// Reads the prompt only if a policy compares prompts.
pub(super) fn features(
    request: &ClientRequest,
    headers: &HeaderMap,
    config: &RouterConfig,
) -> Features {
    let mut features = if request.prompt_is_ids {
        // An id and its comma.
        Features::of_tokens(request.prompt_bytes / 6)
    } else {
        Features::of_text(request.prompt_bytes)
    };
    let policies = Phase::ALL.map(|phase| Policy::of(config, phase));
    if policies.iter().any(|policy| matches!(policy, Policy::Conversation(_))) {
        features.conversation = conversation(request, headers);
    }
    if policies.iter().any(|policy| policy.reads_prompts(features.conversation)) {
        features.read(request.content(), request.cache_salt());
    }
    features
}

fn conversation(request: &ClientRequest, headers: &HeaderMap) -> Option<u64> {
    let named = request.conversation_id().map(|id| id.trim_matches('"').as_bytes());
    let header = || {
        let mut values = CONVERSATION_HEADERS.iter().filter_map(|name| headers.get(*name));
        values.find(|value| !value.is_empty()).map(|value| value.as_bytes())
    };
    named.or_else(header).map(Features::conversation_of)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::PolicyName;
    use crate::dialect::Api;

    fn of(policy: PolicyName, body: &str, headers: &[(&'static str, &str)]) -> Features {
        let mut config = RouterConfig::default();
        config.generation.policy = policy;
        let request = ClientRequest::parse(Api::Chat, body.to_owned().into()).unwrap();
        let headers =
            headers.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()));
        features(&request, &headers.collect(), &config)
    }

    const BODY: &str = r#"{"messages":[{"role":"user","content":"hi"}]}"#;
    const NAMED: &str = r#"{"messages":[],"conversation_params":{"conversation_id":"c-1"}}"#;

    #[test]
    fn a_prompt_is_read_only_for_a_policy_that_compares_prompts() {
        for policy in [PolicyName::RoundRobin, PolicyName::LeastLoaded, PolicyName::PowerOfTwo] {
            let features = of(policy, BODY, &[("x-correlation-id", "c-1")]);
            assert_eq!((features.marks.whole(), features.conversation), (0, None));
        }
        for policy in [PolicyName::Prefix, PolicyName::KvCacheAware, PolicyName::Conversation] {
            assert_eq!(of(policy, BODY, &[]).marks.whole(), 32);
        }
        let named = of(PolicyName::Conversation, BODY, &[("x-correlation-id", "c-1")]);
        assert_eq!(named.marks.whole(), 0, "an id is enough");
    }

    #[test]
    fn a_prompts_salt_is_part_of_what_it_is_known_by() {
        let salted = |salt: &str| {
            let body = format!("{{\"cache_salt\":{salt},{}", &BODY[1..]);
            of(PolicyName::Prefix, &body, &[]).marks
        };
        assert_ne!(salted("\"a\""), salted("\"b\""));
        assert_eq!(salted("\"a\""), salted("\"a\""));
        assert_eq!(salted("null"), of(PolicyName::Prefix, BODY, &[]).marks);
    }

    #[test]
    fn a_conversation_is_named_by_the_body_or_else_by_a_header() {
        let policy = PolicyName::Conversation;
        let id = Some(Features::conversation_of(b"c-1"));
        assert_eq!(of(policy, NAMED, &[("x-correlation-id", "other")]).conversation, id);
        assert_eq!(of(policy, BODY, &[("x-correlation-id", "c-1")]).conversation, id);
        assert_eq!(of(policy, BODY, &[("x-session-id", "c-1")]).conversation, id);
        assert_eq!(of(policy, BODY, &[]).conversation, None);
        for nothing in
            ["null", "7", "{}", r#"{"conversation_id":null}"#, r#"{"conversation_id":""}"#]
        {
            let body = format!(r#"{{"messages":[],"conversation_params":{nothing}}}"#);
            assert_eq!(of(policy, &body, &[]).conversation, None, "{nothing}");
        }
    }
}
