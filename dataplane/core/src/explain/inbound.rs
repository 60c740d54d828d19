//! The destination's side: is it for this pod, and do the policies let it in? The control plane sends
//! all policies to all nodes, so this node can answer for another one.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use super::Known;
use super::outbound::name;
use super::source::certificate;
use super::steps::Steps;
use crate::identity::Identity;
use crate::policy::{self, Action, DenyReason, Examined, Finding, Subject, Verdict};
use crate::proxy::{Demands, Enforcement};
use crate::state::Workload;
use crate::state::resolve::{self, Authority};
use crate::wire::control as pb;

/// A connection that reaches a workload.
pub struct Arrival {
    pub workload: Arc<Workload>,
    pub client: IpAddr,
    /// None in clear.
    pub identity: Option<Identity>,
}

/// `local` is where it arrives; `authority` is None in clear.
pub fn arrive(
    known: &Known<'_>,
    arrival: Arrival,
    local: SocketAddr,
    authority: Option<&Authority>,
    steps: &mut Steps,
) {
    let workload = &arrival.workload;
    let here = known.pod_of(&workload.uid);
    let way = match authority {
        Some(_) => "over mutual TLS",
        None => "in clear",
    };
    if !tell_place(known, workload, here, authority.is_some(), steps) {
        return steps.goes(format!("{way} to {} ({local})", name(workload)));
    }
    if authority.is_some() && here.is_some() {
        certificate(known, &workload.identity(), steps);
    }
    let dst = match authority {
        None => local,
        Some(authority) => {
            let (snapshot, config) = (known.snapshot, known.config);
            match resolve::inbound(snapshot, config, workload, local, authority, None) {
                Ok(inbound) => inbound.dst,
                Err(refusal) => {
                    let remedy = "the records of the workload and of its service contradict each \
                                  other: look at underpass workloads and services";
                    return steps.refused("inbound", &name(workload), refusal.to_string(), remedy);
                }
            }
        }
    };
    if known.config.ports.is_own(dst.port()) {
        let text = format!("{dst} is a port of the proxy itself");
        let remedy = "connect to the application's port instead";
        return steps.refused("inbound", &name(workload), text, remedy);
    }
    steps.goes(format!("{way} to {} ({dst})", name(workload)));
    let subject = Subject {
        identity: arrival.identity,
        source: arrival.client,
        dst,
    };
    policies(known, workload, here, &subject, steps);
}

/// False where no proxy checks anything.
fn tell_place(
    known: &Known<'_>,
    workload: &Workload,
    here: Option<&pb::PodStatus>,
    tunnel: bool,
    steps: &mut Steps,
) -> bool {
    let subject = name(workload);
    let node = &*workload.node;
    let bypassed = |pod: &pb::PodStatus| pod.settings.as_ref().is_some_and(|s| s.bypass_inbound);
    match here {
        Some(pod) if !tunnel && bypassed(pod) => {
            let text = "its inbound traffic isn't captured (bypass-inbound): no policy is asked";
            steps.ok("destination", &subject, text);
            false
        }
        Some(_) => {
            steps.ok("destination", &subject, "a pod of this node");
            true
        }
        None if !workload.hbone => {
            let text = "outside the mesh: nothing of the mesh checks there";
            steps.ok("destination", &subject, text);
            false
        }
        None if workload.native_tunnel => {
            steps.unknown(
                "destination",
                &subject,
                "speaks HBONE itself and decides by itself",
            );
            false
        }
        None if node == known.config.node && tunnel => {
            let text = "wanted in the mesh, but this data plane doesn't have the pod: nobody \
                        accepts the tunnel";
            let remedy = "see why it isn't captured: underpass pods";
            steps.refused("destination", &subject, text, remedy);
            false
        }
        None if node == known.config.node => {
            let text = "wanted in the mesh, but not captured here: nothing checks";
            steps.unknown("destination", &subject, text);
            false
        }
        None => {
            let text =
                format!("node {node} decides; told from the policies that this node has, too");
            steps.ok("destination", &subject, text);
            true
        }
    }
}

fn policies(
    known: &Known<'_>,
    workload: &Workload,
    here: Option<&pb::PodStatus>,
    subject: &Subject,
    steps: &mut Steps,
) {
    let decision = policy::decide(known.snapshot, workload, subject);
    let examined = policy::examine(known.snapshot, workload, subject);
    let by_allow = match &decision.verdict {
        Verdict::Deny(DenyReason::NotAllowed) => true,
        // A DENY came first: what the ALLOW policies would say is told just so.
        Verdict::Deny(_) => {
            let allow = |e: &&Examined| e.action == Some(Action::Allow) && !e.dry_run;
            let mut allows = examined.iter().filter(allow).peekable();
            allows.peek().is_some() && allows.all(|e| !matches!(e.finding, Finding::Matches(_)))
        }
        Verdict::Allow { .. } => false,
    };
    if examined.is_empty() {
        steps.ok(
            "policy",
            &name(workload),
            "no policy concerns it: everybody may",
        );
    }
    for one in &examined {
        let dry = decision
            .dry_run
            .iter()
            .find(|(policy, _)| *policy == one.policy);
        match dry {
            Some((_, would)) => {
                let text = format!("{would}, in dry-run: {}", told(one));
                steps.dry_run("policy", &one.policy, text);
            }
            None if one.dry_run => {
                let text = format!("in dry-run, has nothing to say: {}", told(one));
                steps.ok("policy", &one.policy, text);
            }
            None => match refuses(one, by_allow) {
                true => steps.refused("policy", &one.policy, told(one), ""),
                false => steps.ok("policy", &one.policy, told(one)),
            },
        }
    }
    let denied = matches!(decision.verdict, Verdict::Deny(_));
    if let Verdict::Deny(reason) = decision.verdict {
        steps.refused_because(&reason.to_string(), reason.remedy());
    }
    let Some(settings) = here.and_then(|pod| pod.settings.as_ref()) else {
        return;
    };
    let demands = Demands::of(settings);
    let network = &known.config.network;
    match demands.waypoint(known.snapshot, network, workload, subject) {
        Some((Enforcement::DryRun, reason)) => {
            steps.dry_run("waypoint_required", &name(workload), reason.to_string());
        }
        // Policies come first.
        Some((_, reason)) if !denied => {
            let text = reason.to_string();
            steps.refused("waypoint_required", &name(workload), text, reason.remedy());
        }
        _ => {}
    }
}

fn refuses(one: &Examined, by_allow: bool) -> bool {
    match (&one.finding, one.action) {
        (Finding::Malformed | Finding::NotArrived, _) => true,
        (Finding::Matches(_), action) => action == Some(Action::Deny),
        (Finding::Differs(_), action) => by_allow && action == Some(Action::Allow),
    }
}

fn told(one: &Examined) -> String {
    let action = match one.action {
        Some(Action::Allow) => "ALLOW",
        Some(Action::Deny) => "DENY",
        None => "policy",
    };
    match &one.finding {
        Finding::Matches(rule) => format!("{action}, its rule {rule} matches"),
        Finding::Differs(rules) if rules.is_empty() => {
            format!("{action} without rules: it never matches")
        }
        Finding::Differs(rules) => format!("{action}, doesn't match: {}", rules.join("; ")),
        Finding::Malformed => {
            "rejected as malformed and without a good version: it refuses everybody".to_owned()
        }
        Finding::NotArrived => {
            "listed by the workload but not arrived: refuses everybody until it does".to_owned()
        }
    }
}
