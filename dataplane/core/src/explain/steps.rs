//! The steps of an explanation, and the verdict that follows from them.

use crate::wire::control as pb;
use pb::explain_reply::Step;
use pb::explain_reply::step::Outcome;

/// In the order in which the decision is made.
#[derive(Default)]
pub struct Steps {
    steps: Vec<Step>,
    /// What the first refusal says, and what to do.
    refusal: Option<(String, String)>,
    /// Where it goes when nothing refuses.
    route: String,
}

impl Steps {
    pub fn ok(&mut self, name: &str, subject: &str, text: impl Into<String>) {
        self.put(name, subject, Outcome::Ok, text.into());
    }

    pub fn unknown(&mut self, name: &str, subject: &str, text: impl Into<String>) {
        self.put(name, subject, Outcome::Unknown, text.into());
    }

    pub fn dry_run(&mut self, name: &str, subject: &str, text: impl Into<String>) {
        self.put(name, subject, Outcome::DryRun, text.into());
    }

    pub fn refused(&mut self, name: &str, subject: &str, text: impl Into<String>, remedy: &str) {
        let text = text.into();
        let refusal = || (text.clone(), remedy.to_owned());
        self.refusal.get_or_insert_with(refusal);
        self.put(name, subject, Outcome::Refused, text);
    }

    /// The refusal as connections get it, in place of the words of one policy among several.
    pub fn refused_because(&mut self, text: &str, remedy: &str) {
        let is_policy = |step: &Step| step.outcome() == Outcome::Refused && step.name == "policy";
        if let Some(first) = self.steps.iter().find(|s| s.outcome() == Outcome::Refused)
            && is_policy(first)
        {
            self.refusal = Some((text.to_owned(), remedy.to_owned()));
        }
    }

    /// What the first refusal says.
    pub fn refusal(&self) -> Option<&str> {
        self.refusal.as_ref().map(|(text, _)| text.as_str())
    }

    /// The rest of the way, explained apart.
    pub fn absorb(&mut self, rest: Self) {
        self.steps.extend(rest.steps);
        self.refusal = self.refusal.take().or(rest.refusal);
        self.route = rest.route;
    }

    /// Where the bytes go, in words.
    pub fn goes(&mut self, route: impl Into<String>) {
        self.route = route.into();
    }

    pub fn end(self) -> pb::ExplainReply {
        let unknown = self
            .steps
            .iter()
            .find(|step| step.outcome() == Outcome::Unknown);
        let (allowed, verdict, remedy) = match (self.refusal, unknown) {
            (Some((text, remedy)), _) => (false, format!("refused: {text}"), remedy),
            (None, Some(step)) => {
                let text = match self.route.as_str() {
                    "" => format!("unknown: {}", step.text),
                    route => format!("nothing known refuses it ({route}); unknown: {}", step.text),
                };
                (true, text, String::new())
            }
            (None, None) => (true, format!("allowed: {}", self.route), String::new()),
        };
        pb::ExplainReply {
            steps: self.steps,
            allowed,
            verdict,
            remedy,
        }
    }

    fn put(&mut self, name: &str, subject: &str, outcome: Outcome, text: String) {
        self.steps.push(Step {
            name: name.to_owned(),
            outcome: outcome.into(),
            text,
            subject: subject.to_owned(),
        });
    }
}
