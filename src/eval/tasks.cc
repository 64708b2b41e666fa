#include "krait/eval/tasks.h"

#include <algorithm>
#include <array>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "eval/metrics.h"
#include "eval/template.h"
#include "krait/core/error.h"
#include "krait/io/mapped_file.h"
#include "models/json.h"

namespace krait {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

std::string quoted(const Json& value) { return value.dump(-1, ' ', false, Json::error_handler_t::replace); }

// The fields of a description that say what to do, and those that are for other uses of the file.
constexpr std::array kRead = {"task",           "output_type",   "documents",        "dataset_path",
                              "dataset_kwargs", "test_split",    "validation_split", "doc_to_text",
                              "doc_to_choice",  "doc_to_target", "description",      "target_delimiter",
                              "metric_list",    "num_fewshot",   "repeats"};
constexpr std::array kPassedOver = {"metadata",
                                    "tag",
                                    "task_alias",
                                    "training_split",
                                    "fewshot_split",
                                    "fewshot_config",
                                    "fewshot_delimiter",
                                    "generation_kwargs",
                                    "should_decontaminate",
                                    "doc_to_decontamination_query"};

// What a description says, with what it leaves out filled in.
struct Description {
  std::string name;
  TaskKind kind = TaskKind::multiple_choice;
  std::vector<std::string> metrics;
  fs::path documents;
  Json doc_to_text;
  Json doc_to_choice;
  Json doc_to_target;
  std::string description;
  std::string target_delimiter = " ";
};

class Reader {
 public:
  // `root` must outlive the reader.
  Reader(const Json& root, const fs::path& path) : root_(root), fields_(root, path.string()), path_(path) {}

  Description read() {
    for (const auto& [name, value] : root_.items())
      check(std::ranges::find(kRead, name) != kRead.end() ||
                std::ranges::find(kPassedOver, name) != kPassedOver.end() || value.is_null(),
            "'", name, "' is not understood here");
    Description d;
    d.name = fields_.string("task", path_.stem().string());
    check(!d.name.empty() && std::ranges::none_of(d.name, [](unsigned char c) { return c < ' '; }),
          "'task' is ", quoted(Json(d.name)), ", expected a name of one line");
    d.kind = kind();
    d.metrics = metrics(d.kind);
    d.documents = documents();
    d.description = fields_.string("description", "");
    d.target_delimiter = fields_.string("target_delimiter", " ");
    d.doc_to_text = field("doc_to_text");
    d.doc_to_choice = field("doc_to_choice");
    d.doc_to_target = field("doc_to_target");
    for (const char* name : {"num_fewshot", "repeats"}) {
      const std::int64_t most = std::string_view(name) == "repeats" ? 1 : 0;
      const Json value = field(name);
      check(value.is_null() || value == most || value == 0, "'", name, "' is ", quoted(value), ", expected ",
            most);
    }
    return d;
  }

 private:
  template <typename... Parts>
  void check(bool condition, const Parts&... parts) const {
    require(condition, path_.string(), ": ", parts...);
  }

  [[nodiscard]] Json field(const std::string& name) const {
    return root_.contains(name) ? root_[name] : Json();
  }

  [[nodiscard]] TaskKind kind() const {
    check(fields_.has("output_type"), "'output_type' is missing");
    const std::string name = fields_.string("output_type", "");
    for (const TaskKind kind :
         {TaskKind::multiple_choice, TaskKind::loglikelihood, TaskKind::loglikelihood_rolling})
      if (name == name_of(kind)) return kind;
    check(false, "'output_type' is '", name,
          "', expected multiple_choice, loglikelihood or loglikelihood_rolling");
    return {};
  }

  // A list of names, or of objects with a name as "metric".
  [[nodiscard]] std::vector<std::string> metrics(TaskKind kind) const {
    const Json list = field("metric_list");
    if (list.is_null()) return default_metrics(kind);
    check(list.is_array() && !list.empty(), "'metric_list' is ", quoted(list),
          ", expected a list of at least one metric");
    std::vector<std::string> names;
    for (const Json& item : list) {
      const Json name = item.is_object() && item.contains("metric") ? item["metric"] : item;
      check(name.is_string(), "'metric_list' holds ", quoted(item), ", expected the name of a metric");
      const Metric* metric = find_metric(kind, name.get<std::string>());
      check(metric != nullptr, "metric ", quoted(name), " is not known for ", name_of(kind), ", expected ",
            metric_names(kind));
      if (item.is_object() && item.contains("aggregation"))
        check(item["aggregation"] == metric->aggregation, "the aggregation of ", metric->name, " is ",
              quoted(item["aggregation"]), ", expected \"", metric->aggregation, "\"");
      check(std::ranges::find(names, metric->name) == names.end(), "'metric_list' names ", metric->name,
            " twice");
      names.emplace_back(metric->name);
    }
    return names;
  }

  // "documents", or what the harness has in its place: "dataset_kwargs": {"data_files": ...}, a file or one
  // for each split. Relative to the description.
  [[nodiscard]] fs::path documents() const {
    if (fields_.has("documents")) return path_.parent_path() / fields_.string("documents", "");
    const std::string dataset = fields_.string("dataset_path", "json");
    check(dataset == "json", "'dataset_path' is '", dataset,
          "', expected \"json\": documents are read from local files");
    const Json kwargs = field("dataset_kwargs");
    Json files = kwargs.is_object() && kwargs.contains("data_files") ? kwargs["data_files"] : Json();
    if (files.is_object()) {
      const std::string split = fields_.string("test_split", fields_.string("validation_split", ""));
      check(files.contains(split), "no split of 'data_files' is named by 'test_split' or 'validation_split'");
      files = Json(files[split]);
    }
    if (files.is_array() && files.size() == 1) files = Json(files[0]);
    check(files.is_string(), "names no file of documents, expected \"documents\": \"FILE.jsonl\"");
    return path_.parent_path() / files.get<std::string>();
  }

  const Json& root_;
  JsonFields fields_;
  fs::path path_;
};

// Documents to requests.
class Builder {
 public:
  explicit Builder(const Description& d) : d_(d) {}

  [[nodiscard]] TaskDocument build(const Json& document) const {
    switch (d_.kind) {
      case TaskKind::multiple_choice: return choices(document);
      case TaskKind::loglikelihood:
        return {.requests = {{.context = description(document) + text(document, d_.doc_to_text, "context"),
                              .continuation = text(document, d_.doc_to_target, "continuation")}},
                .choices = {},
                .gold = {},
                .text = {}};
      case TaskKind::loglikelihood_rolling:
        return {.requests = {}, .choices = {}, .gold = {}, .text = text(document, d_.doc_to_target, "text")};
    }
    return {};
  }

 private:
  // Whether `source` stands for a field, whose texts are texts even where they are digits; what a template
  // makes of digits is a number.
  static bool is_field(const Json& document, const Json& source) {
    return source.is_null() ||
           (source.is_string() && document.contains(source.get_ref<const std::string&>()));
  }
  // A template is the name of a field or has {{expressions}}; without a template `fallback` is the field.
  static Json value(const Json& document, const Json& source, const char* fallback) {
    if (source.is_null()) {
      require(document.contains(fallback), "has no field '", fallback, "'");
      return document[fallback];
    }
    if (!source.is_string()) return source;
    const auto& name = source.get_ref<const std::string&>();
    return document.contains(name) ? document[name] : evaluate_template(name, document);
  }
  static std::string text(const Json& document, const Json& source, const char* fallback) {
    const Json found = value(document, source, fallback);
    require(found.is_string() || integer_of(found), "'", fallback, "' is ", quoted(found),
            ", expected a text");
    return text_of(found);
  }

  [[nodiscard]] std::string description(const Json& document) const {
    return d_.description.empty() ? "" : text(document, d_.description, "description");
  }

  // An integer, or a text of digits.
  static std::optional<std::int64_t> integer_of(const Json& value) {
    if (value.is_number_integer() && value.get<double>() < 1e18) return value.get<std::int64_t>();
    if (!value.is_string()) return std::nullopt;
    const auto& digits = value.get_ref<const std::string&>();
    constexpr std::size_t kMostDigits = 18;
    if (digits.empty() || digits.size() > kMostDigits ||
        digits.find_first_not_of("0123456789") != std::string::npos)
      return std::nullopt;
    return std::stoll(digits);
  }

  [[nodiscard]] TaskDocument choices(const Json& document) const {
    TaskDocument out;
    const Json list = value(document, d_.doc_to_choice, "choices");
    require(list.is_array() && !list.empty(), "'choices' is ", quoted(list),
            ", expected a list of at least one text");
    for (const Json& choice : list) {
      require(choice.is_string() && !choice.get_ref<const std::string&>().empty(), "a choice is ",
              quoted(choice), ", expected a text that is not empty");
      out.choices.push_back(choice.get<std::string>());
    }
    const std::string before = description(document);
    const Json context = value(document, d_.doc_to_text, "context");
    const bool is_text = context.is_string() && is_field(document, d_.doc_to_text);
    if (const auto which = is_text ? std::nullopt : integer_of(context)) {
      // The choices are contexts of one continuation, and what stands for the context says which is right.
      const std::string target = text(document, d_.doc_to_target, "continuation");
      for (const std::string& choice : out.choices)
        out.requests.push_back({.context = before + choice, .continuation = d_.target_delimiter + target});
      out.gold = {checked(*which, out.choices)};
      return out;
    }
    require(context.is_string(), "'context' is ", quoted(context), ", expected a text");
    for (const std::string& choice : out.choices)
      out.requests.push_back(
          {.context = before + context.get<std::string>(), .continuation = d_.target_delimiter + choice});
    out.gold =
        gold_of(value(document, d_.doc_to_target, "gold"), is_field(document, d_.doc_to_target), out.choices);
    return out;
  }

  static std::int64_t checked(std::int64_t index, const std::vector<std::string>& choices) {
    require(index >= 0 && index < std::ssize(choices), "'gold' is ", index, ", expected 0 to ",
            choices.size() - 1);
    return index;
  }

  // A place among the choices, several of them, or the text of one. Digits are a place; in a field they are a
  // choice where there is such a one.
  static std::vector<std::int64_t> gold_of(const Json& value, bool of_field,
                                           const std::vector<std::string>& choices) {
    const auto found =
        value.is_string() ? std::ranges::find(choices, value.get_ref<const std::string&>()) : choices.end();
    const auto index = integer_of(value);
    if (index && !(of_field && found != choices.end())) return {checked(*index, choices)};
    if (value.is_string()) {
      require(found != choices.end(), "'gold' is ", quoted(value), ", which is none of the choices");
      return {found - choices.begin()};
    }
    require(value.is_array() && !value.empty(), "'gold' is ", quoted(value),
            ", expected the place of a choice, several places, or a choice");
    std::vector<std::int64_t> gold;
    for (const Json& item : value) {
      require(!item.is_string() && integer_of(item), "'gold' holds ", quoted(item),
              ", expected the place of a choice");
      gold.push_back(checked(item.get<std::int64_t>(), choices));
    }
    return gold;
  }

  const Description& d_;
};

// Calls `body` with each line that is not blank, and its number.
template <typename Body>
void for_each_line(std::string_view content, const Body& body) {
  for (std::int64_t number = 1; !content.empty(); ++number) {
    const std::size_t end = content.find('\n');
    const std::string_view line = content.substr(0, end);
    content.remove_prefix(end == std::string_view::npos ? content.size() : end + 1);
    if (line.find_first_not_of(" \t\r") == std::string_view::npos) continue;
    if (!body(line, number)) return;
  }
}

Json parse_object(std::string_view text, const std::string& name) {
  Json root = parse_json(text, name);
  require(root.is_object(), name, ": is not a JSON object");
  return root;
}

Json first_document(const fs::path& path, std::string_view content) {
  Json first;
  for_each_line(content, [&](std::string_view line, std::int64_t number) {
    first = parse_object(line, concat(path.string(), ":", number));
    return false;
  });
  require(!first.is_null(), path.string(), ": holds no documents");
  return first;
}

// Of documents without a description: their fields say what they are.
Description describe(const fs::path& path, std::string_view content) {
  const Json document = first_document(path, content);
  Description d;
  d.name = path.stem().string();
  d.documents = path;
  if (document.contains("choices"))
    d.kind = TaskKind::multiple_choice;
  else if (document.contains("continuation"))
    d.kind = TaskKind::loglikelihood;
  else if (document.contains("text"))
    d.kind = TaskKind::loglikelihood_rolling;
  else
    fail(ErrorKind::invalid_argument, path.string(),
         ": its first document has none of the fields choices, continuation and text, which tell the kind of "
         "task");
  d.metrics = default_metrics(d.kind);
  return d;
}

}  // namespace

std::string_view name_of(TaskKind kind) {
  switch (kind) {
    case TaskKind::multiple_choice: return "multiple_choice";
    case TaskKind::loglikelihood: return "loglikelihood";
    case TaskKind::loglikelihood_rolling: return "loglikelihood_rolling";
  }
  return "";
}

Task read_task(const fs::path& path, std::int64_t limit) {
  require(limit >= 0, "limit is ", limit, ", expected at least 0");
  const std::string file = io::read_file(path);
  const bool alone = path.extension() == ".jsonl";
  const Description d = alone ? describe(path, file) : Reader(parse_object(file, path.string()), path).read();
  const std::string content = alone ? file : io::read_file(d.documents);
  Task task{.name = d.name,
            .kind = d.kind,
            .metrics = d.metrics,
            .target_delimiter = d.target_delimiter,
            .documents = {}};
  const Builder builder(d);
  for_each_line(content, [&](std::string_view line, std::int64_t number) {
    const std::string name = concat(d.documents.string(), ":", number);
    const Json document = parse_object(line, name);
    try {
      task.documents.push_back(builder.build(document));
    } catch (const Error& error) {
      fail(error.kind(), name, ": ", error.what());
    }
    return limit == 0 || std::ssize(task.documents) < limit;
  });
  require(!task.documents.empty(), d.documents.string(), ": holds no documents");
  return task;
}

std::vector<Task> read_tasks(const std::vector<fs::path>& paths, std::int64_t limit) {
  std::vector<fs::path> files;
  for (const fs::path& path : paths) {
    if (!fs::is_directory(path)) {
      files.push_back(path);
      continue;
    }
    std::set<fs::path> descriptions;
    for (const fs::directory_entry& entry : fs::directory_iterator(path))
      if (entry.path().extension() == ".json") descriptions.insert(entry.path());
    if (descriptions.empty())
      fail(ErrorKind::not_found, path.string(), ": holds no description of a task (.json)");
    files.insert(files.end(), descriptions.begin(), descriptions.end());
  }
  std::vector<Task> tasks;
  std::map<std::string, fs::path> seen;
  for (const fs::path& file : files) {
    tasks.push_back(read_task(file, limit));
    const auto [place, fresh] = seen.emplace(tasks.back().name, file);
    require(fresh, file.string(), ": the task is called '", tasks.back().name, "', as that of ",
            place->second.string(), " is");
  }
  return tasks;
}

}  // namespace krait
