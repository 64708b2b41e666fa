#include "tokenizer/pre_tokenizer.h"

#include <utility>

#include "krait/core/error.h"
#include "tokenizer/byte_alphabet.h"
#include "tokenizer/gpt2_scanner.h"

namespace krait::tokenizer {
namespace {

SplitBehavior behavior_of(const Component& component) {
  const std::string name = component.text("behavior");
  if (name == "Removed") return SplitBehavior::removed;
  if (name == "Isolated") return SplitBehavior::isolated;
  if (name == "MergedWithPrevious") return SplitBehavior::merged_with_previous;
  if (name == "MergedWithNext") return SplitBehavior::merged_with_next;
  if (name == "Contiguous") return SplitBehavior::contiguous;
  component.refuse("behavior", "Removed, Isolated, MergedWithPrevious, MergedWithNext or Contiguous");
}

}  // namespace

PreTokenizer::PreTokenizer(const nlohmann::json& config, std::string_view name) {
  if (!config.is_null()) add(Component(config, concat(name, ": pre_tokenizer")));
}

void PreTokenizer::add(const Component& component) {
  const std::string& type = component.type();
  if (type == "ByteLevel") {
    steps_.emplace_back(ByteLevel{component.flag("add_prefix_space"), component.flag("use_regex", true)});
  } else if (type == "Split") {
    steps_.emplace_back(Split{Pattern(component), behavior_of(component), component.flag("invert", false)});
  } else if (type == "Digits") {
    steps_.emplace_back(Digits{component.flag("individual_digits")});
  } else if (type == "Punctuation") {
    steps_.emplace_back(
        Punctuation{component.has("behavior") ? behavior_of(component) : SplitBehavior::isolated});
  } else if (type == "Metaspace") {
    Metaspace step;
    append_utf8(step.replacement, component.character("replacement"));
    const bool may_prepend = component.flag("add_prefix_space", true);
    const std::string scheme = component.text("prepend_scheme", may_prepend ? "always" : "never");
    if (scheme == "first") {
      step.prepend = Metaspace::Prepend::first;
    } else if (scheme == "never") {
      step.prepend = Metaspace::Prepend::never;
    } else if (scheme != "always") {
      component.refuse("prepend_scheme", "first, always or never");
    }
    if (!may_prepend && scheme != "never")
      component.refuse("prepend_scheme", "never, as add_prefix_space is false");
    step.split = component.flag("split", true);
    steps_.emplace_back(std::move(step));
  } else if (type == "Sequence") {
    for (const Component& part : component.parts("pretokenizers")) add(part);
  } else {
    component.refuse_type("ByteLevel, Split, Digits, Punctuation, Metaspace or Sequence");
  }
}

bool PreTokenizer::ends_in_byte_level() const {
  return !steps_.empty() && std::holds_alternative<ByteLevel>(steps_.back());
}

bool PreTokenizer::is_gpt2() const {
  const auto* step = steps_.size() == 1 ? std::get_if<ByteLevel>(&steps_.front()) : nullptr;
  return step != nullptr && step->use_regex && !step->add_prefix_space;
}

void PreTokenizer::leave_bytes() { std::get<ByteLevel>(steps_.back()).spell_bytes = false; }

// Applies the steps, one after the other, to the pieces that it holds.
struct PreTokenizer::Cutter {
  std::string_view text;
  bool at_start;  // the first piece is the beginning of the input
  Workspace& workspace;

  // Replaces the text: `rewrite(piece, is_first, out)` appends the new text of a piece to `out`.
  template <typename Rewrite>
  void rewrite_pieces(const Rewrite& rewrite) {
    std::string& out = workspace.next_text;
    out.clear();
    bool is_first = at_start;
    for (Range& piece : workspace.pieces) {
      const std::size_t begin = out.size();
      rewrite(text.substr(piece.begin, piece.end - piece.begin), is_first, out);
      piece = {begin, out.size()};
      is_first = false;
    }
    std::swap(workspace.text, workspace.next_text);
    text = workspace.text;
  }

  // Cuts every piece: `cut(piece, out)` appends its parts, as ranges of `text`, to `out`.
  template <typename Cut>
  void cut_pieces(const Cut& cut) {
    std::vector<Range>& out = workspace.next_pieces;
    out.clear();
    for (const Range& piece : workspace.pieces) cut(piece, out);
    at_start = at_start && !out.empty() && out.front().begin == workspace.pieces.front().begin;
    std::swap(workspace.pieces, out);
  }

  // Cuts every piece at matches: `find(text, matches)` appends those in the text of a piece.
  template <typename Find>
  void cut_at_matches(SplitBehavior behavior, bool invert, const Find& find) {
    cut_pieces([&](const Range& piece, std::vector<Range>& out) {
      workspace.matches.clear();
      find(text.substr(piece.begin, piece.end - piece.begin), workspace.matches);
      segment(piece, invert);
      join(behavior, out);
    });
  }

  // From matches to segments that cover the piece.
  void segment(const Range& piece, bool invert) {
    workspace.segments.clear();
    std::size_t at = piece.begin;
    for (const Range& match : workspace.matches) {
      const Range range{piece.begin + match.begin, piece.begin + match.end};
      if (at < range.begin) workspace.segments.push_back({{at, range.begin}, invert});
      workspace.segments.push_back({range, !invert});
      at = range.end;
    }
    if (at < piece.end) workspace.segments.push_back({{at, piece.end}, invert});
  }

  // From segments to pieces. Empty ones are kept until here: an empty match separates its neighbours.
  void join(SplitBehavior behavior, std::vector<Range>& out) const {
    const auto& segments = workspace.segments;
    const auto joins_next = [&](std::size_t i) {
      if (i + 1 == segments.size()) return false;
      const bool here = segments[i].is_match;
      const bool next = segments[i + 1].is_match;
      switch (behavior) {
        case SplitBehavior::removed:
        case SplitBehavior::isolated: return false;
        case SplitBehavior::merged_with_previous: return !here && next;
        case SplitBehavior::merged_with_next: return here && !next;
        case SplitBehavior::contiguous: return here == next;
      }
      return false;
    };
    for (std::size_t i = 0; i < segments.size(); ++i) {
      if (behavior == SplitBehavior::removed && segments[i].is_match) continue;
      Range piece = segments[i].range;
      while (joins_next(i)) piece.end = segments[++i].range.end;
      if (piece.begin < piece.end) out.push_back(piece);
    }
  }

  template <typename Predicate>
  void cut_at_characters(SplitBehavior behavior, const Predicate& predicate) {
    cut_at_matches(behavior, false, [&](std::string_view piece, std::vector<Range>& matches) {
      for (std::size_t i = 0; i < piece.size();) {
        const CodePoint c = code_point_at(piece, i);
        if (predicate(c.value)) matches.push_back({i, i + c.length});
        i += c.length;
      }
    });
  }

  void operator()(const ByteLevel& step) {
    if (step.add_prefix_space) {
      rewrite_pieces([](std::string_view piece, bool, std::string& out) {
        if (!piece.starts_with(' ')) out.push_back(' ');
        out.append(piece);
      });
    }
    if (step.use_regex) {
      cut_pieces([&](const Range& piece, std::vector<Range>& out) {
        const std::string_view bounded = text.substr(0, piece.end);
        for (std::size_t begin = piece.begin; begin < piece.end;) {
          const std::size_t end = gpt2_match_end(bounded, begin);
          out.push_back({begin, end});
          begin = end;
        }
      });
    }
    if (step.spell_bytes) {
      rewrite_pieces(
          [](std::string_view piece, bool, std::string& out) { append_byte_characters(out, piece); });
    }
  }

  void operator()(const Split& step) {
    cut_at_matches(step.behavior, step.invert, [&](std::string_view piece, std::vector<Range>& matches) {
      step.pattern.find_all(piece, workspace.regex, matches);
    });
  }

  void operator()(const Digits& step) {
    cut_at_characters(step.individual ? SplitBehavior::isolated : SplitBehavior::contiguous, is_number);
  }

  void operator()(const Punctuation& step) { cut_at_characters(step.behavior, is_punctuation); }

  void operator()(const Metaspace& step) {
    using Prepend = Metaspace::Prepend;
    rewrite_pieces([&](std::string_view piece, bool is_first, std::string& out) {
      const bool starts_so = piece.starts_with(' ') || piece.starts_with(step.replacement);
      const bool wanted = step.prepend == Prepend::always || (step.prepend == Prepend::first && is_first);
      if (wanted && !starts_so) out.append(step.replacement);
      for (const char c : piece) {
        if (c == ' ') {
          out.append(step.replacement);
        } else {
          out.push_back(c);
        }
      }
    });
    if (!step.split) return;
    cut_at_matches(SplitBehavior::merged_with_next, false,
                   [&](std::string_view piece, std::vector<Range>& matches) {
                     const std::size_t length = step.replacement.size();
                     for (auto at = piece.find(step.replacement); at != std::string_view::npos;
                          at = piece.find(step.replacement, at + length)) {
                       matches.push_back({at, at + length});
                     }
                   });
  }
};

std::string_view PreTokenizer::split(std::string_view text, bool at_start, Workspace& workspace) const {
  workspace.pieces.assign(1, Range{0, text.size()});
  Cutter cutter{text, at_start, workspace};
  for (const auto& step : steps_) std::visit(cutter, step);
  return cutter.text;
}

}  // namespace krait::tokenizer
